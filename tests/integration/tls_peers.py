"""Both ends of TLS as an attacker holds them: impostors to be called, and callers of any kind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from dstack_mesh.model import AppId, TcpAddress
from dstack_mesh.sidecar import Sidecar
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.kms import APP_CA_NAME, Kms
from tests.integration.harness import Answer, Client, Mesh, eventually, mesh, request

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

_ALERT = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_(?:ALERT_)?(\w+)")


def new_app_id() -> AppId:
    """Give an app-id that nobody else has: no test can meet another one's connections."""
    return AppId(os.urandom(20).hex())


def real_chain(kms: Kms, app_id: AppId, like: Issued) -> Issued:
    """Issue a good chain with a key of the type that `like` has: see `Impostor.show`."""
    key = serialization.load_pem_private_key(like.key_pem, None)
    if not isinstance(key, rsa.RSAPrivateKey):
        return kms.issue(app_id)
    ca_key, ca = kms.app_ca(app_id)
    extensions = certs.leaf_extensions((), server_auth=True, client_auth=True)
    extensions += [certs.app_id_extension(app_id), certs.usage_extension("app:custom")]
    strong = rsa.generate_private_key(65_537, 2048)
    return kms.sign_leaf(APP_CA_NAME, ca_key, extensions, (ca, kms.root), key=strong)


def any_answer(received: bytes) -> bytes | None:
    """Answer 200 as soon as a head is there, and again to each further piece."""
    if b"\r\n\r\n" not in received:
        return None
    return b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class Attacked:
    """A mesh in which sidecar `a` calls, and targets are whatever a test puts up."""

    mesh: Mesh
    version: ssl.TLSVersion
    """The one that impostors speak."""

    @property
    def kms(self) -> Kms:
        return self.mesh.world.kms

    @property
    def sidecar(self) -> Sidecar:
        return self.mesh.sidecars["a"]

    def impostor(self, issued: Issued, *, port: int = 0, answer: bool = True) -> Impostor:
        return Impostor(
            issued,
            port=port,
            min_version=self.version,
            max_version=self.version,
            answer=any_answer if answer else None,
        )

    def route(self, app_id: AppId, impostor: Impostor) -> None:
        """Have the gateway send all of the app's connections to `impostor`."""
        self.mesh.world.gateway.add_route(app_id, impostor.address.host, impostor.address.port)

    def pooled(self, app_id: AppId) -> int:
        """Count the sidecar's open connections to the app."""
        return len(
            [
                one
                for one in self.sidecar.worker.upstreams
                if (peer := getattr(one, "peer", None)) is not None and peer.app_id == app_id
            ]
        )

    async def make_pooled(self, app_id: AppId, good: Impostor) -> None:
        """Call the target while it is good, so that a connection to it is kept."""
        answer = await self.mesh.call("a", app_id)
        assert answer.status == 200, answer
        assert self.pooled(app_id) == 1
        assert good.handshakes == 1


@contextlib.asynccontextmanager
async def attacked(directory: Path, version: str, **environ: str) -> AsyncIterator[Attacked]:
    """Start `a`, whose targets speak just this TLS version, and a good `b` with a backend."""
    async with mesh(directory) as one:
        await one.start("a", backend=False, MESH_TLS_MIN_VERSION=version, **environ)
        await one.start("b", MESH_TLS_MIN_VERSION=version)
        yield Attacked(one, VERSIONS[version])


async def all_over(impostor: Impostor) -> None:
    """Wait until each connection that the impostor accepted has come to its end."""
    await eventually(
        lambda: impostor.closed + len(impostor.failures) == impostor.connections,
    )


def caller_context(
    root_pem: bytes, issued: Issued | None = None, version: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    """Make the TLS client of a caller that shows `issued`, or no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A caller shows whatever it has, weak keys too; it is the target that has to mind.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.check_hostname = False
    context.load_verify_locations(cadata=root_pem.decode())
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if issued is not None:
        issued.load_into(context)
    return context


async def call_inbound(
    address: TcpAddress,
    context: ssl.SSLContext,
    method: str = "GET",
    path: str = "/",
    headers: tuple[tuple[str, str], ...] = (),
) -> Answer:
    """Send one request as a caller from outside, on a connection of its own."""
    async with Client.connect(address, context) as client:
        await client.send(request(method, path, headers))
        return await client.answer(method)


async def alert_of(address: TcpAddress, context: ssl.SSLContext) -> str:
    """Connect and send a request; give the name of the alert that came (RFC 8446 6.2).

    A plain blocking socket on purpose: it sees what OpenSSL sees. Whatever else ends the
    connection, a bare end of stream or a reset among them, fails the test.
    """
    return await asyncio.to_thread(_alert_of, address, context)


def _alert_of(address: TcpAddress, context: ssl.SSLContext) -> str:
    with socket.create_connection((address.host, address.port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain) as tls:
                # More than fits on the way: the alert has to survive that all of it is refused.
                tls.sendall(request("POST", "/secret", body=bytes(4_000_000)))
                received = tls.recv(65536)
        except ssl.SSLError as error:
            if match := _ALERT.fullmatch(error.reason or ""):
                return match[1].lower()
            raise
    raise AssertionError(f"no alert; received {received!r}")


def resumes(address: TcpAddress, context: ssl.SSLContext) -> bool:
    """Have an exchange, then offer its session (or ticket) again; tell whether it was taken."""
    session: ssl.SSLSession | None = None
    for _ in range(2):
        with (
            socket.create_connection((address.host, address.port), timeout=10) as plain,
            context.wrap_socket(plain, session=session) as tls,
        ):
            tls.sendall(request())
            assert tls.recv(65536).startswith(b"HTTP/1.1 200 ")
            session, reused = tls.session, bool(tls.session_reused)
    return reused

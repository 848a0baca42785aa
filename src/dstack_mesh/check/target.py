"""The whole way to a target, step by step; nothing is asked of it before it is verified."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dstack_mesh.check.gateway import connects, resolves
from dstack_mesh.check.result import Group, Result, failed, ok, skipped
from dstack_mesh.errors import BadTarget
from dstack_mesh.gateway_domain import Gateway
from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.identity.tls import describe_tls_failure, refused_our_certificate
from dstack_mesh.model import Role, Target
from dstack_mesh.outbound.target import Endpoint, endpoint
from dstack_mesh.relay.dial import open_socket
from dstack_mesh.settings.tree import Settings

STEPS = NAME, RESOLVES, CONNECTS, TLS, CHAIN, APP_ID, HEALTH = (
    "its name is valid",
    "its name resolves",
    "TCP connects",
    "TLS comes about",
    "its chain holds",
    "it is the app asked for",
    "its mesh answers /health",
)
_MAX_HEAD = 64 * 1024
_REFUSED = (
    "the target is under another KMS, or its clock or ours is wrong; `dstack-mesh inspect` shows"
    " its chain"
)
_GATEWAY_ENDED = (
    "a gateway ends a connection this way when it knows no such app, or none of its instances"
    " answers on that port: is the app running, and its mesh listening there?"
)


class _EndedError(Exception):
    """The way ends at a step."""

    def __init__(self, step: str, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.result = failed(step, detail, remedy)


async def check_target(
    target: Target, settings: Settings, snapshot: Snapshot | None, gateway: Gateway | None
) -> Group:
    """Walk to `target` as the mesh would, and say at which step the way ends."""
    done: list[Result] = []
    try:
        await _walk(done, target, settings, snapshot, gateway)
    except _EndedError as ended:
        done.append(ended.result)
    except BadTarget as error:
        done.append(failed(NAME, error.detail, "correct the app-id, or the gateway's domain"))
    last = done[-1]
    rest = STEPS[len(done) :] if last.status == "failed" else ()
    done += [skipped(step, f"the way ends at: {last.name}") for step in rest]
    return Group(f"target {target.app_id}", tuple(done))


async def _walk(
    done: list[Result],
    target: Target,
    settings: Settings,
    snapshot: Snapshot | None,
    gateway: Gateway | None,
) -> None:
    if snapshot is None:
        raise _EndedError(NAME, "we have no identity to go with", "see the identity above")
    if gateway is None:
        raise _EndedError(NAME, "the gateway is not known", "see the gateway above")
    where = endpoint(target, gateway, settings.dstack.gateway_connect)
    shown = where.server_name or str(where.connect)
    done.append(ok(NAME, f"{shown}, by way of {where.connect}"))
    seconds = settings.outbound.connect_timeout
    for result in (
        await resolves(where.connect, RESOLVES),
        await connects(where.connect, seconds, CONNECTS),
    ):
        if result.status != "ok":
            raise _EndedError(result.name, result.detail, result.remedy)
        done.append(result)
    async with _tls(done, where, snapshot, seconds) as (reader, writer):
        tls = writer.get_extra_info("ssl_object")
        done.append(ok(TLS, f"{tls.version()}, {tls.cipher()[0]}"))
        _identify(done, where, snapshot, tls)
        done.append(await _health(reader, writer, shown, seconds))


@asynccontextmanager
async def _tls(
    done: list[Result], where: Endpoint, snapshot: Snapshot, seconds: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    try:
        async with asyncio.timeout(seconds):
            sock = await open_socket(asyncio.get_running_loop(), where.connect)
            reader, writer = await asyncio.open_connection(
                sock=sock,
                ssl=snapshot.client_context,
                server_hostname=where.server_name or "",
                limit=_MAX_HEAD,
            )
    except TimeoutError:
        remedy = "is the app running? does the gateway reach it?"
        raise _EndedError(TLS, f"no handshake within {seconds:g} s", remedy) from None
    except ssl.SSLCertVerificationError as error:
        done.append(ok(TLS, "as far as its certificate"))
        raise _EndedError(CHAIN, error.verify_message, _REFUSED) from error
    except (OSError, EOFError) as error:
        raise _tls_failed(TLS, error) from error
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def _identify(done: list[Result], where: Endpoint, snapshot: Snapshot, tls: ssl.SSLObject) -> None:
    try:
        peer = snapshot.peers.identify(tls, Role.TARGET)
    except ChainRuleBroken as error:
        raise _EndedError(CHAIN, str(error), _REFUSED) from error
    if peer is None:
        raise _EndedError(CHAIN, "it showed no certificate", _REFUSED)
    done.append(ok(CHAIN, "under our KMS, by every chain rule"))
    if peer.app_id != where.app_id:
        remedy = (
            "somebody else answers at its address: look at the gateway's routes, or MESH_GATEWAY"
        )
        raise _EndedError(APP_ID, f"it is app {peer.app_id}", remedy)
    done.append(ok(APP_ID, f"verified: {peer.app_id}"))


async def _health(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, seconds: float
) -> Result:
    """Ask for `/health`, on a connection whose other end is verified."""
    writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    try:
        async with asyncio.timeout(seconds):
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        return failed(HEALTH, f"no answer within {seconds:g} s", "look at the target's log")
    except (OSError, EOFError, ValueError) as error:
        # With TLS 1.3 a refusal of our certificate comes only now.
        raise _tls_failed(HEALTH, error) from error
    words = head.split(b"\r\n", 1)[0].split(b" ", 2)
    status = words[1].decode("latin-1") if len(words) > 1 else ""
    if not words[0].startswith(b"HTTP/1.") or status != "200":
        shown = ascii(b" ".join(words[:2]).decode("latin-1"))
        return failed(HEALTH, f"it answers {shown}", "is it a mesh? look at the target's log")
    return ok(HEALTH, "200")


def _tls_failed(step: str, error: Exception) -> _EndedError:
    detail = describe_tls_failure(error)
    if isinstance(error, asyncio.IncompleteReadError):
        detail = "the connection ended without an answer"
    if refused_our_certificate(error):
        return _EndedError(
            step,
            detail,
            "the target is under another KMS, or its clock is wrong; its log says what it refused",
        )
    plain_end = not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError)
    return _EndedError(
        step, detail, _GATEWAY_ENDED if plain_end else "is there a mesh at that port?"
    )

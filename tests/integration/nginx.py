"""A real nginx with the printed configuration, in front of a sidecar in nginx mode."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstack_mesh.app import Sidecar
from dstack_mesh.inbound.nginx_config import nginx_options, whole_file
from dstack_mesh.model import TcpAddress
from dstack_mesh.settings.load import load_settings
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.ports import common_port
from tests.integration.harness import Mesh, mesh, tcp
from tests.integration.tls_peers import caller_context

NGINX = "/usr/sbin/nginx"
_START_SECONDS = 20.0


def need_nginx() -> None:
    """Skip where there is no nginx; where nothing may be left out, fail."""
    if Path(NGINX).exists():
        return
    reason = f"there is no {NGINX}: install nginx-light"
    assert os.environ.get("CI") != "true", reason
    pytest.skip(reason)


@contextlib.asynccontextmanager
async def running_nginx(config: str, directory: Path, address: TcpAddress) -> AsyncIterator[Path]:
    """Run nginx with `config` for the block, from when it listens; give its error log."""
    file, log = directory / "nginx.conf", directory / "nginx.log"
    file.write_text(config)
    # Workers of another user could not reach the auth service's socket, nor the tests' files.
    user = "user root; " if os.geteuid() == 0 else ""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(NGINX, "-e", "stderr", "-c", str(file), "-g", f"daemon off; {user}"),
            stdout=output,
            stderr=output,
        )
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not await _listens(address):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.01)
        yield log
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _listens(address: TcpAddress) -> bool:
    try:
        _, writer = await asyncio.open_connection(address.host, address.port)
    except OSError:
        return False
    writer.close()
    return True


@dataclass
class NginxMode:
    """A mesh of `a` and `b`, where nginx takes `b`'s callers and `b`'s sidecar judges them."""

    mesh: Mesh
    address: TcpAddress
    """Where nginx listens."""

    log: Path
    state: Path

    @property
    def sidecar(self) -> Sidecar:
        return self.mesh.sidecars["b"]

    @property
    def backend(self) -> Backend:
        return self.mesh.backends["b"]

    def issue(self, name: str = "a") -> Issued:
        return self.mesh.world.kms.issue(self.mesh.app_id(name))

    def caller(self, issued: Issued | None) -> ssl.SSLContext:
        return caller_context(self.mesh.world.kms.root_pem, issued)


@contextlib.asynccontextmanager
async def nginx_mode(
    directory: Path, *, unix: bool = True, caller: bool = False, rules: str = "", **environ: str
) -> AsyncIterator[NginxMode]:
    """Open such a mesh; `environ` is for `b`'s sidecar and its nginx, `caller` starts `a` too.

    `rules` is what stands in the sidecar's settings file.
    """
    need_nginx()
    state = directory / "nginx"
    state.mkdir()
    port = common_port(["127.0.0.1"])
    auth = f"unix:{state}/auth.sock" if unix else f"127.0.0.1:{port}"
    async with mesh(directory / "world") as one:
        if caller:
            await one.start("a", backend=False)
        if "MESH_BACKEND" not in environ:
            environ["MESH_BACKEND"] = str(await one.start_backend("b"))
        environ = {"MESH_INBOUND_MODE": "nginx", "MESH_AUTH_LISTEN": auth, **environ}
        file = state / "mesh.toml"
        file.write_text(rules)
        await one.start("b", backend=False, config=file, **environ)
        address = tcp(one.app("b").env["MESH_INBOUND_LISTEN"])
        async with running_nginx(configuration(one, state, environ), state, address) as log:
            yield NginxMode(one, address, log, state)


def configuration(one: Mesh, state: Path, environ: dict[str, str]) -> str:
    """Print what nginx is to do for `b`, whose identity is written to `state`."""
    issued = one.world.kms.issue(one.app_id("b"))
    key = state / "key.pem"
    key.touch(mode=0o600)
    key.write_bytes(issued.key_pem)
    (state / "cert.pem").write_bytes(b"".join(issued.chain_pem[:2]))
    (state / "ca.pem").write_bytes(one.world.kms.root_pem)
    files = {
        "MESH_CERT_FILE": str(state / "cert.pem"),
        "MESH_KEY_FILE": str(key),
        "MESH_CA_FILE": str(state / "ca.pem"),
    }
    settings = load_settings({}, {**one.app("b").env, **files, **environ}, None).settings
    return whole_file(nginx_options(settings, state))

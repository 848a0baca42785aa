"""nginx in front, for real: its start, renewals that touch no connection, a backend that moves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.integration.harness import Client, Mesh, eventually, mesh, problem, request, tcp
from tests.integration.nginx import need_nginx
from tests.integration.tls_peers import caller_context

from dstack_mesh.image.front import Front, resolve_host
from dstack_mesh.image.identity_files import IdentityFiles
from dstack_mesh.image.layout import Owner
from dstack_mesh.image.privileges import User, as_user
from dstack_mesh.model import TcpAddress
from dstack_mesh.settings.load import load_settings

NOBODY = 65534


@pytest.fixture
def directory() -> AsyncIterator[Path]:
    """A directory that another user than root can reach."""
    path = Path(tempfile.mkdtemp(prefix="front-"))
    path.chmod(0o755)
    yield path  # type: ignore[misc]
    shutil.rmtree(path, ignore_errors=True)


@dataclass
class Stage:
    """A mesh whose app `b` is served by a `Front`, and where its backend's name leads."""

    one: Mesh
    directory: Path
    environ: dict[str, str] = field(default_factory=dict)
    hosts: set[str] = field(default_factory=lambda: {"127.0.0.1"})
    as_root: bool = field(default_factory=lambda: os.geteuid() == 0)

    @property
    def address(self) -> TcpAddress:
        return tcp(self.one.app("b").env["MESH_INBOUND_LISTEN"])

    async def resolve(self, host: str) -> set[str]:
        if not self.hosts:
            raise OSError("no such name")
        return self.hosts

    def command(self, argv: Sequence[str]) -> list[str]:
        return as_user(User(NOBODY, NOBODY), argv) if self.as_root else list(argv)

    def front(self) -> Front:
        owner = Owner(NOBODY, NOBODY) if self.as_root else None
        for name in ("identity", "state"):
            path = self.directory / name
            path.mkdir(exist_ok=True)
            if self.as_root and name == "state":
                os.chown(path, NOBODY, NOBODY)
        settings = load_settings({}, {**self.one.app("b").env, **self.environ}, None).settings
        return Front(
            settings,
            IdentityFiles(self.directory / "identity", owner),
            self.directory / "nginx.conf",
            self.directory / "state",
            self.command,
            self.resolve,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Front]:
        front = self.front()
        task = asyncio.create_task(front.run())
        try:
            await self.until_open(task)
            yield front
        finally:
            await front.quit(5)
            task.cancel()  # where it has not come so far
            await asyncio.gather(task, return_exceptions=True)

    async def until_open(self, task: asyncio.Task[str]) -> None:
        async with asyncio.timeout(20):
            while True:
                assert not task.done(), task
                try:
                    _, writer = await asyncio.open_connection(self.address.host, self.address.port)
                except OSError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                return

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Client]:
        kms = self.one.world.kms
        context = caller_context(kms.root_pem, kms.issue(self.one.app_id("a")))
        async with Client.connect(self.address, context) as client:
            yield client


@pytest.fixture
async def stage(directory: Path) -> AsyncIterator[Stage]:
    need_nginx()
    async with mesh(directory / "w") as one:
        auth = directory / "auth"
        auth.mkdir()
        backend = tcp(str(await one.start_backend("b")))
        environ = {
            "MESH_INBOUND_MODE": "nginx",
            "MESH_AUTH_LISTEN": f"unix:{auth}/auth.sock",
            "MESH_BACKEND": f"backend-app:{backend.port}",
        }
        await one.start("b", backend=False, **environ)
        auth.chmod(0o755)
        (auth / "auth.sock").chmod(0o666)
        yield Stage(one, directory, environ)


async def get(client: Client, path: str = "/") -> int:
    await client.send(request("GET", path))
    return (await client.answer()).status


def leaf_seen(client: Client) -> bytes:
    shown: bytes = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return shown


async def test_a_call_through_it(stage: Stage) -> None:
    async with stage.running(), stage.connected() as client:
        await client.send(request("GET", "/echo"))
        answer = await client.answer()
        assert answer.status == 200
        assert stage.one.app_id("a").encode() in answer.body


async def test_a_renewal_touches_no_connection(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """The open one goes on under the old certificate, a new one is shown the new one."""
    stage.environ["MESH_CERT_LIFETIME"] = "3s"
    with caplog.at_level(logging.INFO):
        async with stage.running() as front, stage.connected() as old:
            first = leaf_seen(old)
            seen = front.identity.fetched
            await eventually(lambda: front.identity.fetched > seen + 1, 20)
            assert await get(old) == 200
            async with stage.connected() as new:
                assert leaf_seen(new) != first
                assert await get(new) == 200
    assert "nginx_reloaded" not in caplog.text


async def test_a_backend_whose_name_is_not_known_yet(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_mesh.image.front.WATCH_SECONDS", 0.05)
    stage.hosts = set()
    async with stage.running():
        async with stage.connected() as client:
            await client.send(request("GET", "/"))
            problem(await client.answer(), "connect_failed", 502)
        stage.hosts = {"127.0.0.1"}
        async with asyncio.timeout(20):
            status = 0
            while status != 200:
                async with stage.connected() as client:
                    status = await get(client)


async def test_a_configuration_that_nginx_does_not_take_changes_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dstack_mesh.image.front.WATCH_SECONDS", 0.05)
    async with stage.running():
        with caplog.at_level(logging.ERROR):
            stage.hosts = {"not an address;"}
            await eventually(lambda: "nginx_reload_refused" in caplog.text, 20)
        async with stage.connected() as client:
            assert await get(client) == 200


async def test_what_is_in_flight_is_finished(stage: Stage) -> None:
    async with stage.running() as front, stage.connected() as client:
        await client.send(request("GET", "/slow?seconds=1"))
        await eventually(lambda: len(stage.one.backends["b"].requests) == 1)
        quitting = asyncio.create_task(front.quit(10))
        assert (await client.answer()).status == 200
        await quitting


async def test_its_end_is_told(stage: Stage) -> None:
    front = stage.front()
    task = asyncio.create_task(front.run())
    try:
        await stage.until_open(task)
        assert front._nginx is not None
        front._nginx.signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await task == "exit status 0"
    finally:
        front.kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_address_that_is_taken(stage: Stage) -> None:
    server = await asyncio.start_server(lambda r, w: None, stage.address.host, stage.address.port)
    async with server:
        front = stage.front()
        try:
            async with asyncio.timeout(30):
                assert await front.run() == "exit status 1"
        finally:
            front.kill()


async def test_names_are_resolved_as_this_machine_does() -> None:
    assert await resolve_host("127.0.0.1") == {"127.0.0.1"}
    with pytest.raises(OSError, match=r".+"):
        await resolve_host("no-such-host.invalid")

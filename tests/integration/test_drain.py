"""Ending a sidecar that is at work (interface.md, Lifecycle), as a process and by signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstack_mesh.model import TcpAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Request, Response
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    eventually,
    mesh,
    nobody_listens,
    request,
)
from tests.integration.processes import SidecarProcess, sidecar_process
from tests.integration.tls_peers import caller_context

_PROMPT = 5.0
"""Seconds for what has to happen at once: far under the 30 s of every time limit here."""


@dataclass
class Site:
    """`b` is a process that is told to end; `a` is there to call it and to be called by it."""

    mesh: Mesh
    target: SidecarProcess
    backend: Backend
    """The one of `b`; `/wait` is answered, on either app, when `release` is set."""

    release: asyncio.Event
    ready_file: Path

    @property
    def inbound(self) -> TcpAddress:
        return self.target.address("inbound")

    @property
    def outbound(self) -> TcpAddress:
        return self.target.address("outbound")

    def context(self) -> ssl.SSLContext:
        """Make the TLS client of app `a`."""
        kms = self.mesh.world.kms
        return caller_context(kms.root_pem, kms.issue(self.mesh.app_id("a")))

    def caller(self) -> contextlib.AbstractAsyncContextManager[Client]:
        """Connect to the inbound listener as app `a`."""
        return Client.connect(self.inbound, self.context())

    def to_a(self, path: str = "/") -> bytes:
        """Write a request for `b`'s outbound listener."""
        return request("GET", path, [("x-dstack-target-app", self.mesh.app_id("a"))])

    async def ask(self, path: str) -> Answer:
        """Ask the admin listener."""
        async with Client.connect(self.target.address("admin")) as client:
            await client.send(request("GET", path))
            return await client.answer()

    async def draining(self) -> dict[str, dict[str, object]]:
        """Wait until `/readyz` says that the mesh is stopping; give its checks."""
        end = time.monotonic() + _PROMPT
        while (answer := await self.ask("/readyz")).status == 200:
            assert time.monotonic() < end, "still ready"
        checks: dict[str, dict[str, object]] = json.loads(answer.body)["checks"]
        return checks

    def events(self) -> list[object]:
        return [line["event"] for line in self.target.log]


@contextlib.asynccontextmanager
async def _site(tmp_path: Path, **environ: str) -> AsyncIterator[Site]:
    release = asyncio.Event()

    async def wait(_: Request) -> Response:
        await release.wait()
        return Response(200, [], b"waited\n")

    async with mesh(tmp_path) as one:
        await one.start("a")
        backend = one.backends["b"] = Backend("b")
        for each in one.backends.values():
            each.on("/wait", wait)
        app = one.app("b")
        env = {**app.env, "MESH_BACKEND": str(await backend.start()), **environ}
        async with sidecar_process(app.directory, env) as target:
            site = Site(one, target, backend, release, app.directory / "ready.json")
            await eventually(lambda: "ready" in site.events())
            yield site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with _site(tmp_path) as one:
        yield one


async def _ended(client: Client) -> bytes:
    async with asyncio.timeout(_PROMPT):
        return await client.closed()


async def test_what_is_in_flight_finishes_and_nothing_new_comes_in(site: Site) -> None:
    async with contextlib.AsyncExitStack() as stack:
        waiting = [await stack.enter_async_context(site.caller()) for _ in range(5)]
        uploads = [await stack.enter_async_context(site.caller()) for _ in range(3)]
        idle = await stack.enter_async_context(site.caller())
        local = await stack.enter_async_context(Client.connect(site.outbound))

        await idle.send(request())
        answer = await idle.answer()
        assert (answer.status, answer.get(b"connection")) == (200, None)
        await local.send(site.to_a())
        assert (await local.answer()).status == 200
        through_a = [asyncio.ensure_future(site.mesh.call("a", "b", path="/wait")) for _ in "ab"]
        for client in waiting:
            await client.send(request("GET", "/wait"))
        for client in uploads:
            length = [("Content-Length", "200000")]
            await client.send(request("POST", "/upload", length) + bytes(100_000))
        at_work = len(waiting) + len(uploads) + len(through_a)
        await eventually(lambda: len(site.backend.requests) == at_work + 1)

        site.target.signal(signal.SIGTERM)

        checks = await site.draining()
        assert checks.pop("draining") == {"ok": False, "reason": "the mesh is stopping"}
        assert all(check["ok"] for check in checks.values()), "and for no other reason"
        assert (await site.ask("/livez")).status == 200
        assert await _ended(idle) == b""
        await nobody_listens(site.inbound)
        # The application still needs the mesh to answer what it was asked.
        await local.send(site.to_a("/echo"))
        assert (await local.answer()).status == 200
        async with Client.connect(site.outbound) as another:
            await another.send(site.to_a("/echo"))
            assert (await another.answer()).status == 200
        assert site.target.process.returncode is None

        for client in uploads:
            await client.send(bytes(100_000))
            answer = await client.answer("POST")
            assert (answer.status, answer.get(b"connection")) == (200, b"close")
            assert json.loads(answer.body)["bytes"] == 200_000
            assert await _ended(client) == b""
        assert site.target.process.returncode is None
        site.release.set()
        for client in waiting:
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"waited\n")
            assert answer.get(b"connection") == b"close"
            assert await _ended(client) == b""
        for call in through_a:
            assert (await call).body == b"waited\n"

        assert await _ended(local) == b""
    assert await site.target.exit_status() == 0
    assert not site.ready_file.exists()
    assert site.events()[-1] == "stopped"
    assert "drain_timeout" not in site.events()
    await nobody_listens(site.outbound)


async def test_outbound_finishes_its_own_when_inbound_is_done(site: Site) -> None:
    async with Client.connect(site.outbound) as client, Client.connect(site.outbound) as idle:
        await idle.send(site.to_a())
        assert (await idle.answer()).status == 200
        await client.send(site.to_a("/wait"))
        await eventually(lambda: len(site.mesh.backends["a"].requests) == 2)
        site.target.signal(signal.SIGTERM)
        await nobody_listens(site.outbound)
        assert await _ended(idle) == b""
        assert "draining" in await site.draining()
        site.release.set()
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"waited\n")
        assert answer.get(b"connection") == b"close"
        assert await _ended(client) == b""
    assert await site.target.exit_status() == 0


async def test_a_response_that_has_begun_goes_on_to_its_end(site: Site) -> None:
    begun = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        begun.set()
        yield b"first "
        await site.release.wait()
        yield b"last"

    async def stream(_: Request) -> Response:
        return Response(200, [], body())

    site.backend.on("/stream", stream)
    async with site.caller() as client:
        await client.send(request("GET", "/stream"))
        head = await client.until(b"first ")
        assert b"connection" not in head.lower(), "it was to be kept then"
        site.target.signal(signal.SIGTERM)
        await site.draining()
        site.release.set()
        assert b"last" in await _ended(client)
    assert await site.target.exit_status() == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_an_idle_mesh_ends_at_once(site: Site, number: signal.Signals, status: int) -> None:
    async with site.caller() as inbound, Client.connect(site.outbound) as outbound:
        await inbound.send(request())
        await inbound.answer()
        await outbound.send(site.to_a())
        await outbound.answer()
        started = time.monotonic()
        site.target.signal(number)
        assert await _ended(inbound) == b""
        assert await _ended(outbound) == b""
        assert await site.target.exit_status() == status
        assert time.monotonic() - started < _PROMPT
    assert not site.ready_file.exists()


async def test_a_caller_that_never_says_goodbye_holds_nothing_up(site: Site) -> None:
    """It leaves the close_notify unanswered, as a caller does that has frozen."""

    def connect() -> ssl.SSLSocket:
        plain = socket.create_connection((site.inbound.host, site.inbound.port), timeout=10)
        frozen = site.context().wrap_socket(plain)
        frozen.sendall(request())
        assert frozen.recv(65536).startswith(b"HTTP/1.1 200 ")
        return frozen

    with await asyncio.to_thread(connect):
        started = time.monotonic()
        site.target.signal(signal.SIGTERM)
        assert await site.target.exit_status() == 0
        assert time.monotonic() - started < 2 * _PROMPT, "the limit for everything is 30 s"


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGTERM, 143),
    ],
)
async def test_a_second_signal_ends_it_at_once(
    site: Site, first: signal.Signals, second: signal.Signals, status: int
) -> None:
    async with site.caller() as client:
        await client.send(request("GET", "/wait"))
        await eventually(lambda: len(site.backend.requests) == 1)
        site.target.signal(first)
        await site.draining()
        started = time.monotonic()
        site.target.signal(second)
        assert await site.target.exit_status() == status
        assert time.monotonic() - started < _PROMPT
        assert await _ended(client) == b""
    site.release.set()


async def test_draining_takes_no_longer_than_its_limit(tmp_path: Path) -> None:
    async with _site(tmp_path, MESH_DRAIN_TIMEOUT="700ms") as site:
        async with site.caller() as client, Client.connect(site.outbound) as local:
            await client.send(request("GET", "/events?n=2&seconds=30"))
            await client.until(b"event 1 of 2")
            await local.send(site.to_a("/wait"))
            await eventually(lambda: len(site.mesh.backends["a"].requests) == 1)
            started = time.monotonic()
            site.target.signal(signal.SIGTERM)
            assert await site.target.exit_status() == 0
            assert 0.7 <= time.monotonic() - started < _PROMPT
            assert b"0\r\n\r\n" not in await _ended(client), "it must not look complete"
            assert await _ended(local) == b""
        (line,) = (line for line in site.target.log if line["event"] == "drain_timeout")
        assert (line["inbound"], line["outbound"]) == (1, 1)
        assert not site.ready_file.exists()
        site.release.set()

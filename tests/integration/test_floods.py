"""Floods and drips against sidecar processes: others are served, and memory is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.model import TcpAddress
from tests.integration.harness import Client, Mesh, eventually, mesh, request
from tests.integration.processes import SidecarProcess, sidecar_process
from tests.integration.tls_peers import caller_context, new_app_id

MANY = 600


@contextlib.asynccontextmanager
async def flooded(
    directory: Path, *, open_files: int | None = None, **environ: str
) -> AsyncIterator[tuple[Mesh, SidecarProcess]]:
    """Run `b`, with a backend, as a process; `a`, which calls it, in this one."""
    async with mesh(directory / "world") as one:
        await one.start("a", backend=False)
        env = {
            **one.app("b").env,
            "MESH_BACKEND": str(await one.start_backend("b")),
            "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
            "MESH_ADMIN_LISTEN": "127.0.0.1:0",
            **environ,
        }
        async with sidecar_process(directory, env, open_files=open_files) as process:
            yield one, process


async def held(stack: contextlib.AsyncExitStack, address: TcpAddress, count: int) -> list[Client]:
    """Open connections that stay; those that are refused are as good."""
    clients = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            clients.append(await stack.enter_async_context(Client.connect(address)))
    return clients


async def is_served(one: Mesh, process: SidecarProcess) -> None:
    """Call in from another app, and out to the guest agent."""
    assert (await one.call("a", "b")).status == 200
    async with Client.connect(process.address("outbound")) as client:
        await client.send(request("GET", "/health"))
        assert (await client.answer()).status == 200


async def test_silent_handshakes_keep_nobody_out(tmp_path: Path) -> None:
    async with flooded(tmp_path, MESH_MAX_CONNECTIONS="400") as (one, process):
        before, _ = process.memory()
        async with contextlib.AsyncExitStack() as stack:
            await held(stack, process.address("inbound"), MANY)
            for _ in range(5):
                await is_served(one, process)
            assert process.memory()[0] - before < 400 * 128 * 1024
        await is_served(one, process)


async def test_dripping_heads_keep_nobody_out_and_cost_little(tmp_path: Path) -> None:
    async with flooded(tmp_path, MESH_HEAD_TIMEOUT="60") as (one, process):
        before, _ = process.memory()
        async with contextlib.AsyncExitStack() as stack:
            clients = await held(stack, process.address("outbound"), MANY)
            for byte in b"GET /health HTTP/1.1\r\nHost: a\r\nX-Drip: ":
                for client in clients:
                    client.writer.write(bytes([byte]))
                if byte in b"/ ":
                    await is_served(one, process)
            assert process.memory()[0] - before < MANY * 32 * 1024
            clients[0].writer.write(b"1\r\n\r\n")
            assert (await clients[0].answer()).status == 200, "a slow one is served, too"


async def test_drips_end_with_the_time_for_a_head(tmp_path: Path) -> None:
    async def drip(client: Client) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await client.send(b"G")
                await asyncio.sleep(0.05)

    async with (
        flooded(tmp_path, MESH_HEAD_TIMEOUT="1") as (_, process),
        Client.connect(process.address("outbound")) as client,
    ):
        dripping = asyncio.create_task(drip(client))
        assert await client.closed() == b"", "each byte does not buy another second"
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


async def test_readers_that_do_not_read_hold_a_bounded_amount(tmp_path: Path) -> None:
    async with flooded(tmp_path) as (one, process):
        context = caller_context(one.world.kms.root_pem, one.world.kms.issue(new_app_id()))
        before, _ = process.memory()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                client = await stack.enter_async_context(
                    Client.connect(process.address("inbound"), context)
                )
                client.writer.transport.pause_reading()
                await client.send(request("GET", "/download?bytes=50000000"))
            await is_served(one, process)
            await is_served(one, process)
            assert process.memory()[0] - before < 20 * 2 * 1024 * 1024


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit (util-linux)")
@pytest.mark.parametrize("listener", ["inbound", "outbound"])
async def test_running_out_of_descriptors_is_survived(tmp_path: Path, listener: str) -> None:
    async with flooded(tmp_path, open_files=96) as (one, process):
        await is_served(one, process)
        async with contextlib.AsyncExitStack() as stack:
            await held(stack, process.address(listener), 300)
            ticks = process.cpu_seconds()
            await asyncio.sleep(0.5)  # the time in which a listener that spins would show it
            assert process.cpu_seconds() - ticks < 0.25
        for _ in range(100):
            try:
                await is_served(one, process)
                break
            except (AssertionError, OSError):
                await asyncio.sleep(0.05)
        else:
            await is_served(one, process)
        said = [line for line in process.log if line["event"] == "accept_paused"]
        assert [line["listener"] for line in said] == [listener], "once, however long it lasts"
        await eventually(lambda: process.process.returncode is None)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit (util-linux)")
@pytest.mark.parametrize("flooded_at", ["inbound", "outbound"])
async def test_descriptors_are_kept_for_what_is_in_progress(
    tmp_path: Path, flooded_at: str
) -> None:
    """A flood takes what one listener may have; others have theirs, and so has who was accepted."""
    async with (
        flooded(tmp_path, open_files=128) as (one, process),
        Client.connect(process.address("outbound")) as early,
        contextlib.AsyncExitStack() as stack,
    ):
        await early.send(request("GET", "/health"))
        assert (await early.answer()).status == 200
        await held(stack, process.address(flooded_at), 300)
        await eventually(
            lambda: any(line["event"] == "accept_paused" for line in process.log),
        )
        # A connection to the guest agent, and one to another app, that are not open yet.
        await early.send(request("GET", "/info"))
        assert (await early.answer()).status == 200
        await early.send(request("GET", "/", [("x-dstack-target-app", one.app_id("a"))]))
        assert (await early.answer()).error in ("tls_failed", "upstream_closed"), "it got that far"
        async with Client.connect(process.address("admin")) as client:
            await client.send(request("GET", "/livez"))
            assert (await client.answer()).status == 200
        if flooded_at == "inbound":
            async with Client.connect(process.address("outbound")) as client:
                await client.send(request("GET", "/health"))
                assert (await client.answer()).status == 200


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit (util-linux)")
async def test_who_only_holds_descriptors_gives_way(tmp_path: Path) -> None:
    async with (
        flooded(tmp_path, open_files=128, MESH_HEAD_TIMEOUT="1") as (_, process),
        contextlib.AsyncExitStack() as stack,
    ):
        silent = await held(stack, process.address("outbound"), 300)
        async with Client.connect(process.address("outbound")) as client:
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200, "idle for five minutes they may not be"
        assert await silent[0].closed() == b""


@pytest.mark.parametrize("listener", ["inbound", "outbound"])
async def test_who_holds_all_places_and_asks_nothing_gives_way(
    tmp_path: Path, listener: str
) -> None:
    most = 60
    environ = {"MESH_MAX_CONNECTIONS": str(most), "MESH_HEAD_TIMEOUT": "2"}
    async with (
        flooded(tmp_path, **environ) as (one, process),
        contextlib.AsyncExitStack() as stack,
    ):
        address = process.address(listener)
        # Past the handshake, but a stranger: that takes no certificate.
        tls = caller_context(one.world.kms.root_pem) if listener == "inbound" else None
        silent = [
            await stack.enter_async_context(Client.connect(address, tls)) for _ in range(most)
        ]
        await silent[-1].send(request("GET", "/health"))
        assert (await silent[-1].answer()).status == 200
        await asyncio.sleep(2)  # as long as a head may take
        for _ in range(3):
            await is_served(one, process)
        assert await silent[0].closed() == b""
        await silent[-1].send(request("GET", "/health"))
        assert (await silent[-1].answer()).status == 200, "who has asked last stays"
        said = [line for line in process.log if line["event"] == "connections_at_limit"]
        assert [line["setting"] for line in said] == ["MESH_MAX_CONNECTIONS"]


async def test_half_open_peers_are_let_go_at_once(tmp_path: Path) -> None:
    """They have finished sending: nothing, the half of a head, or the half of a body."""
    async with flooded(tmp_path) as (one, process):
        target = ("x-dstack-target-app", one.app_id("a"))
        half = request("POST", "/", [target, ("Content-Length", "10")]) + b"half"
        async with contextlib.AsyncExitStack() as stack:
            for said in (b"", b"GET / HTTP/1.1\r\nHo", half):
                for client in await held(stack, process.address("outbound"), 30):
                    await client.send(said)
                    client.writer.write_eof()
                    assert b"200 OK" not in await client.closed()
            for client in await held(stack, process.address("inbound"), 30):
                client.writer.write_eof()
                assert await client.closed() == b""
            await is_served(one, process)


async def test_connections_that_come_and_go_keep_nobody_out(tmp_path: Path) -> None:
    """Fast, by hundreds; and they leave no memory behind."""
    async with flooded(tmp_path) as (one, process):
        context = caller_context(one.world.kms.root_pem, one.world.kms.issue(new_app_id()))

        async def come_and_go(listener: str) -> None:
            for _ in range(150):
                async with Client.connect(
                    process.address(listener), context if listener == "inbound" else None
                ) as client:
                    client.reset()

        async def flood() -> None:
            await asyncio.gather(*(come_and_go(name) for name in ("inbound", "outbound") * 2))

        await flood()
        before, _ = process.memory()
        flooding = asyncio.create_task(flood())
        await is_served(one, process)
        await flooding
        await is_served(one, process)
        assert process.memory()[0] - before < 300 * 16 * 1024

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
        said = [line for line in process.log if line["event"] == "accept_failed"]
        assert len(said) <= 5
        await eventually(lambda: process.process.returncode is None)

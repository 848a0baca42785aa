from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.harness import Client, eventually, request

from dstack_mesh.image.bridge import Bridge
from dstack_mesh.model import UnixAddress
from dstack_mesh.sim.backend import Backend


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.fixture
async def bridged(tmp_path: Path) -> AsyncIterator[tuple[Path, Backend]]:
    backend = Backend()
    await backend.start(UnixAddress(str(tmp_path / "to")))
    server = await Bridge(str(tmp_path / "from"), str(tmp_path / "to")).start()
    try:
        yield tmp_path, backend
    finally:
        server.close()
        await backend.aclose()
        await eventually(lambda: len(asyncio.all_tasks()) == 1)  # no connection is left behind


async def test_bytes_go_both_ways(bridged: tuple[Path, Backend]) -> None:
    directory, _ = bridged
    async with connected(directory / "from") as client:
        for size in (10, 1_000_000):
            await client.send(request("POST", "/mirror", body=b"x" * size))
            answer = await client.answer("POST")
            assert len(answer.body) == size


async def test_the_sockets_mode(bridged: tuple[Path, Backend]) -> None:
    directory, _ = bridged
    assert stat.S_IMODE((directory / "from").stat().st_mode) == 0o660


async def test_an_agent_that_is_not_there(
    bridged: tuple[Path, Backend], capfd: pytest.CaptureFixture[str]
) -> None:
    directory, backend = bridged
    await backend.aclose()
    async with connected(directory / "from") as client:
        assert await client.closed() == b""
    assert "does not answer" in capfd.readouterr().err


async def test_an_agent_that_was_started_again(bridged: tuple[Path, Backend]) -> None:
    directory, backend = bridged
    await backend.aclose()
    again = Backend("again")
    await again.start(UnixAddress(str(directory / "to")))
    try:
        async with connected(directory / "from") as client:
            await client.send(request())
            assert (await client.answer()).get(b"x-backend") == b"again"
    finally:
        await again.aclose()


async def test_the_end_of_one_side_ends_the_other(bridged: tuple[Path, Backend]) -> None:
    directory, backend = bridged
    async with connected(directory / "from") as client:
        await client.send(request())
        await client.answer()
        backend.drop_connections()
        assert await client.closed() == b""


async def test_as_a_process(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "dstack_mesh.image.bridge")
    process = await asyncio.create_subprocess_exec(
        *command, str(tmp_path / "from"), str(tmp_path / "to"), env=dict(os.environ)
    )
    try:
        await eventually(lambda: (tmp_path / "from").exists())
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()

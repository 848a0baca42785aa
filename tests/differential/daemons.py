"""Real servers as child processes: found, started on free ports, ended for sure."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

_PATH = "/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin"
_START_SECONDS = 20.0
_STOP_SECONDS = 10.0
_TRIES = 5


def required(binary: str) -> str:
    """Give the path of a server; skip where it is missing, but fail in CI, which installs it."""
    found = shutil.which(binary) or shutil.which(binary, path=_PATH)
    if found is None:
        reason = f"{binary} is missing: apt-get install --no-install-recommends {binary}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextlib.asynccontextmanager
async def daemon(
    directory: Path, ports: int, command: Callable[[list[int]], Sequence[str]]
) -> AsyncIterator[list[int]]:
    """Run a server for the block, from when all its ports accept; give the ports.

    `command` gets free ports, writes the configuration and gives the command line; it is asked
    again where somebody else took one of the ports meanwhile. Output goes to files in `directory`.
    """
    for _ in range(_TRIES):
        chosen = _free_ports(ports)
        with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
            process = await asyncio.create_subprocess_exec(
                *command(chosen),
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        try:
            if await _accepting(process, chosen):
                yield chosen
                return
        finally:
            await _end(process)
    raise AssertionError((directory / "err").read_text(errors="replace"))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]


async def _accepting(process: asyncio.subprocess.Process, ports: list[int]) -> bool:
    """Wait until the process accepts on all ports; `False` where it has ended instead."""
    async with asyncio.timeout(_START_SECONDS):
        for port in ports:
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    break
    return process.returncode is None


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()

"""Sidecars and the simulator as processes of their own, as users run them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from dstack_mesh.model import TcpAddress
from tests.integration.harness import eventually, tcp

COMMAND = (sys.executable, "-m", "dstack_mesh")
_START_SECONDS = 20.0
_STOP_SECONDS = 20.0


def clean_environ() -> dict[str, str]:
    """Give this process's environment without settings of a mesh."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MESH_", "DSTACK_"))
    }


def children(pid: int) -> list[int]:
    """Give the process ids of a process's children that have not ended."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in map(int, found) if is_there(child)]


def is_there(pid: int) -> bool:
    """Tell whether a process is there and has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class SidecarProcess:
    """A running `dstack-mesh run`."""

    def __init__(self, process: Process, bound: Mapping[str, str | None], log: Path) -> None:
        self.process = process
        self._bound = bound
        self._log = log

    def address(self, listener: str) -> TcpAddress:
        return tcp(self._bound[listener])

    @property
    def log(self) -> list[dict[str, object]]:
        """The log's events so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_status(self) -> int:
        """Wait for the process to end by itself."""
        async with asyncio.timeout(_STOP_SECONDS):
            return await self.process.wait()

    def cpu_seconds(self) -> float:
        """Give the processor time it has taken so far."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> tuple[int, int]:
        """Give resident bytes: now, and the most there have been."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = {}
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = int(value.split()[0]) * 1024
        return found["VmRSS"], found["VmHWM"]


@contextlib.asynccontextmanager
async def sidecar_process(
    directory: Path,
    environ: Mapping[str, str],
    *,
    open_files: int | None = None,
    config: Path | None = None,
) -> AsyncIterator[SidecarProcess]:
    """Run a sidecar for the block, from when it is ready; `directory` gets its log.

    `open_files` is the most that it may have open, `config` its settings file.
    """
    limit = () if open_files is None else ("prlimit", f"--nofile={open_files}:{open_files}")
    file = () if config is None else ("-c", str(config))
    ready = directory / "ready.json"
    log = directory / "log.jsonl"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(*limit, *COMMAND, "run", *file, "--ready-file", str(ready)),
            env={**clean_environ(), **environ},
            stderr=output,
            stdout=output,
        )
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not ready.exists():
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.01)
        yield SidecarProcess(process, json.loads(ready.read_text()), log)
    finally:
        if process.returncode is None:
            workers = children(process.pid)
            for pid in (process.pid, *workers):
                os.kill(pid, signal.SIGKILL)
            await process.wait()
            await eventually(lambda: not any(map(is_there, workers)))

"""A sidecar in a process of its own: started, watched, measured, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_mesh.demo import client

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

START_SECONDS = 30.0
"""A loaded machine takes its time; a healthy one takes half a second."""

_POLL_SECONDS = 0.02
_STOP_SECONDS = 3.0
_SETTINGS = ("MESH_", "DSTACK_")


class SidecarError(Exception):
    """A sidecar did not start; the text says why, with what it logged last."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A process's resident memory in bytes."""

    now: int
    peak: int


class Sidecar:
    """`dstack-mesh run` for one app; its output goes to `log`."""

    outbound: str
    """The address bound, `host:port`, known after `wait_ready`; so is `admin`."""

    admin: str

    def __init__(self, name: str, environ: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.log = directory / "sidecar.log"
        self._ready_file = directory / "ready.json"
        self._environ = environ
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, command: Sequence[str] = (sys.executable, "-m", "dstack_mesh")) -> None:
        """Start the process, which is then under way. Raises `SidecarError`."""
        # Settings of the shell that the demo was called from are meant for another mesh.
        environ = {k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS)}
        with self.log.open("wb") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(*command, "run", "--ready-file", str(self._ready_file)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**environ, **self._environ},
                    # Ctrl-C is the demo's to handle: it ends its sidecars when it is done.
                    start_new_session=True,
                )
            except OSError as error:
                raise SidecarError(f"{self.name}'s sidecar cannot be started: {error}") from error

    async def wait_ready(self) -> None:
        """Return when it says so itself (`/readyz`). Raises `SidecarError`."""
        deadline = time.monotonic() + START_SECONDS
        while not await self._ready():
            if self.ended is not None:
                raise SidecarError(self.describe_end())
            if time.monotonic() > deadline:
                raise SidecarError(
                    f"{self.name}'s sidecar is not ready after {START_SECONDS:g} s{self._said()}"
                )
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self) -> None:
        """End the process, in order if it can, and wait until it is gone."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def wait_ended(self) -> None:
        """Return when the process is gone."""
        if self._process is not None:
            await self._process.wait()

    @property
    def pid(self) -> int:
        """The process's id, 0 before it was started."""
        return self._process.pid if self._process is not None else 0

    @property
    def ended(self) -> int | None:
        """The exit status once the process has ended; negative for a signal."""
        return self._process.returncode if self._process is not None else None

    def describe_end(self, *, with_log: bool = True) -> str:
        """Say how the process ended, with the last line of its log."""
        status = self.ended
        how = f"by signal {-status}" if status is not None and status < 0 else f"with {status}"
        return f"{self.name}'s sidecar ended {how}{self._said() if with_log else ''}"

    def memory(self) -> Memory:
        """Read the memory from /proc. Raises `OSError`, also where /proc does not tell."""
        found = {}
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in {"VmRSS", "VmHWM"}:
                found[key] = int(value.split()[0]) * 1024
        if "VmRSS" not in found:
            raise OSError(f"/proc/{self.pid}/status has no VmRSS")
        return Memory(found["VmRSS"], max(found.get("VmHWM", 0), found["VmRSS"]))

    async def _ready(self) -> bool:
        if not self._ready_file.exists():
            return False
        bound = json.loads(self._ready_file.read_text())
        self.outbound, self.admin = bound["outbound"], bound["admin"]
        try:
            return (await client.get(self.admin, "/readyz")).status == 200
        except OSError:
            return False

    def _said(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            if lines:
                return f"; it said last: {lines[-1]}"
        return ""

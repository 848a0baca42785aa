"""A sidecar as a process of its own, and what the kernel says of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Process:
    """A running process under test."""

    pids: list[int]
    bound: dict[str, str]
    ready_seconds: float

    def cpu_seconds(self) -> float:
        """utime and stime of all its processes together."""
        total = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def rss_mb(self) -> float:
        """Resident memory of all its processes together, in MB."""
        return sum(_status_kb(pid, "VmRSS") for pid in self.pids) / 1024


def _status_kb(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


@contextlib.contextmanager
def sidecar(env: Mapping[str, str]) -> Iterator[Process]:
    """Run `dstack-mesh run` with these settings until the block ends."""
    with tempfile.TemporaryDirectory() as directory:
        ready = Path(directory) / "ready"
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "dstack_mesh", "run", "--ready-file", str(ready)],
            env={**os.environ, **env},
            stderr=subprocess.DEVNULL,
        )
        try:
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > started + 10:
                    raise RuntimeError(f"the sidecar did not start (status {process.poll()})")
                time.sleep(0.002)
            seconds = time.monotonic() - started
            yield Process([process.pid], json.loads(ready.read_text()), seconds)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

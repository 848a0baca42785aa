"""A running program with all its children, and what the kernel says of them.

CPU time is `sum_exec_runtime` of every thread, the nanoseconds that /proc/PID/task/TID/schedstat
begins with. The kernel scales utime and stime to that same sum, so it is their total without the
10 ms steps of /proc/PID/stat, which are too coarse for a run of a second.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.cores import LAYOUT, Role

_STOP_SECONDS = 10.0
_PROC = Path("/proc")


@dataclass
class Process:
    """A program under test, or several that do one work together."""

    pids: list[int]
    bound: dict[str, str] = field(default_factory=dict)
    """The addresses of its listeners, by the names of the sidecar's ready file."""

    ready_seconds: float = 0.0

    def tree(self) -> list[int]:
        """Give its processes as they are now: the ones started, and their descendants."""
        found: list[int] = []
        waiting = list(self.pids)
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            for task in _tasks(pid):
                with contextlib.suppress(OSError):
                    waiting += map(int, (task / "children").read_text().split())
        return found

    def cpu_seconds(self) -> float:
        """User and system time of all its threads together."""
        return sum(map(self.cpu_seconds_of, self.tree()))

    @staticmethod
    def cpu_seconds_of(pid: int) -> float:
        """User and system time of all threads of one process."""
        return _cpu_ns(pid) / 1e9

    def rss_mb(self) -> float:
        """Resident memory of all its processes together, in MB; shared pages count for each."""
        return sum(_status_kb(pid, "VmRSS") for pid in self.tree()) / 1024

    def memory_kb(self) -> int:
        """Proportional set size (PSS) of all its processes: shared pages count once."""
        return sum(_pss_kb(pid) for pid in self.tree())

    def open_files(self) -> int:
        """Open file descriptors of all its processes together."""
        return sum(len(list((_PROC / str(pid) / "fd").iterdir())) for pid in self.tree())

    def threads(self) -> int:
        """Threads of all its processes together, the kernel's tasks."""
        return sum(len(list(_tasks(pid))) for pid in self.tree())

    def forget_peak(self) -> None:
        """Have the kernel note peaks of memory anew from here (proc(5), clear_refs)."""
        for pid in self.tree():
            (_PROC / str(pid) / "clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """The most that was resident since `forget_peak`, of all its processes, in MB."""
        return sum(_status_kb(pid, "VmHWM") for pid in self.tree()) / 1024

    def together(self, other: Process) -> Process:
        """Give both as one: nginx and the auth service that it asks, two sidecars of a chain."""
        return Process([*self.pids, *other.pids], self.bound | other.bound)


def _tasks(pid: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (_PROC / str(pid) / "task").iterdir()


def _cpu_ns(pid: int) -> int:
    total = 0
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total


def _status_kb(pid: int, name: str) -> int:
    return _field((_PROC / str(pid) / "status").read_text(), name)


def _pss_kb(pid: int) -> int:
    return _field((_PROC / str(pid) / "smaps_rollup").read_text(), "Pss")


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


@contextlib.contextmanager
def running(
    command: Sequence[str], role: Role, **options: object
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program on the cores of its role until the block ends; killed if it does not end."""
    process = subprocess.Popen(LAYOUT.pin(command, role), **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def eventually(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    """Look every 2 ms until `condition` holds. Raises `RuntimeError` when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(failure)
        time.sleep(0.002)

"""The process's side of a sidecar's life: signals, exit status, ready file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

_EXIT_STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130}
_EXIT_STATUS_AT_ONCE = {signal.SIGTERM: 143, signal.SIGINT: 130}


def allow_many_files() -> None:
    """Raise this process's limit on open files to what it may have: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Signals:
    """SIGTERM and SIGINT: the first asks for an orderly end, a second one ends at once.

    SIGHUP calls `hangup`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hangup: Callable[[], None] = lambda: None,
        *,
        second_ends: bool = True,
    ) -> None:
        """Without `second_ends` a second signal does nothing: another process sees to that.

        It and we may both be sent the first one, by systemd or a terminal.
        """
        self._second_ends = second_ends
        self._asked = asyncio.Event()
        self.exit_status = 0
        """0 after SIGTERM, 130 after SIGINT, or what `end` was told."""
        for number in _EXIT_STATUS:
            loop.add_signal_handler(number, self._received, number)
        loop.add_signal_handler(signal.SIGHUP, hangup)

    def end(self, exit_status: int) -> None:
        """Ask for an orderly end from inside, with this exit status."""
        self.exit_status = exit_status
        self._asked.set()

    async def wait(self) -> None:
        """Return at the first signal, or when `end` was called."""
        await self._asked.wait()

    def _received(self, number: signal.Signals) -> None:
        if self._asked.is_set():
            if self._second_ends:
                os._exit(_EXIT_STATUS_AT_ONCE[number])
            return
        self.exit_status = _EXIT_STATUS[number]
        self._asked.set()


def write_ready_file(path: Path, bound: Mapping[str, str | None]) -> None:
    """Write the bound addresses and the process id as JSON, so that a reader sees all or nothing.

    Raises OSError.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps({**bound, "pid": os.getpid()}, separators=(",", ":")) + "\n")
        draft.replace(path)
    except OSError:
        remove_ready_file(draft)
        raise


def remove_ready_file(path: Path) -> None:
    """Take away a ready file that no longer tells the truth; one that cannot go is left."""
    with contextlib.suppress(OSError):
        path.unlink()

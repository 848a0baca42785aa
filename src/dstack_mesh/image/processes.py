"""A child process: started, signalled, ended in steps, and its end told in words."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LAST_STEP_SECONDS = 1.0


class ProcessError(Exception):
    """A process cannot run; the text says why."""


class Child:
    """One child process, by the name that logs call it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @classmethod
    async def start(cls, name: str, command: Sequence[str], environ: Mapping[str, str]) -> Self:
        """Start `command`, with this process's output. Raises OSError."""
        return cls(name, await asyncio.create_subprocess_exec(*command, env=dict(environ)))

    @property
    def running(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self._process.returncode is None

    async def ended(self) -> str:
        """Wait for its end and say how it ended."""
        return described(await self._process.wait())

    def signal(self, number: int) -> None:
        """Send a signal; one that has ended gets none."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)

    async def end(self, signals: Sequence[int], seconds: float) -> None:
        """Ask it to end by the first signal; after `seconds` by the others, one a second; kill."""
        patience = max(seconds, 0.0)
        for number in (*signals, signal.SIGKILL):
            if not self.running:
                return
            self.signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._process.wait()
            patience = _LAST_STEP_SECONDS


def described(status: int) -> str:
    """Say what a process's end status means."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"

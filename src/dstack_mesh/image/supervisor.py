"""Runs what one container runs: the mesh, and beside it nginx, a bridge to the agent, or both.

If one of them ends, so do the others and the container: docker starts it again as a whole, and
nothing runs on half. At a signal to end, nginx finishes the callers' requests first, while the mesh
still answers it and serves outbound; then the mesh finishes its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dstack_mesh.image.processes import Child, ProcessError
from dstack_mesh.log import event

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dstack_mesh.image.front import Front

log = logging.getLogger(__name__)

_EXIT_STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130}
_EXIT_STATUS_AT_ONCE = {signal.SIGTERM: 143, signal.SIGINT: 130}
_FAILED_DRAIN_SECONDS = 3.0
_SPARE_SECONDS = 0.5
"""For the mesh to say that its time is over."""


@dataclass(frozen=True, slots=True)
class Command:
    """A process to run."""

    name: str
    argv: Sequence[str]
    environ: Mapping[str, str]


class Supervisor:
    """Runs the commands, the mesh's the last, and `front` where nginx is to be in front of it."""

    def __init__(self, commands: Sequence[Command], front: Front | None, drain: float) -> None:
        """`drain` is in seconds: the most that the end may take."""
        self._commands = commands
        self._front = front
        self._drain = drain
        self._children: list[Child] = []
        self._asked = asyncio.Event()
        self._signal = signal.SIGTERM

    async def run(self) -> int:
        """Run until a signal or until one of them ends; the exit status."""
        loop = asyncio.get_running_loop()
        for number in _EXIT_STATUS:
            loop.add_signal_handler(number, self._received, number)
        loop.add_signal_handler(signal.SIGHUP, self._pass_on, signal.SIGHUP)
        try:
            for command in self._commands:
                child = await Child.start(command.name, command.argv, command.environ)
                self._children.append(child)
        except OSError as error:
            reason = f"{command.argv[0]} cannot be run: {error.strerror}"
            event(log, logging.ERROR, "container_process_failed", reason=reason)
            await self._end(min(_FAILED_DRAIN_SECONDS, self._drain))
            return 1
        watched = {asyncio.create_task(child.ended()): child.name for child in self._children}
        if self._front is not None:
            watched[asyncio.create_task(self._front.run())] = "nginx"
        asked = asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait([asked, *watched], return_when=asyncio.FIRST_COMPLETED)
            if self._asked.is_set():
                await self._end(self._drain)
                return _EXIT_STATUS[self._signal]
            _tell_ends(watched)
            await self._end(min(_FAILED_DRAIN_SECONDS, self._drain))
            return 1
        finally:
            for task in (asked, *watched):
                task.cancel()
            await asyncio.gather(asked, *watched, return_exceptions=True)

    async def _end(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        event(log, logging.INFO, "container_ending", timeout=seconds)
        if self._front is not None:
            if self._asked.is_set():
                self._children[-1].signal(signal.SIGUSR1)  # `/readyz` turns 503
            await self._front.quit(seconds - _SPARE_SECONDS)
        for child in reversed(self._children):  # the bridge last: the mesh may still need it
            signals = (self._signal, self._signal)
            await child.end(signals, max(deadline - loop.time(), 0.0) + _SPARE_SECONDS)

    def _received(self, number: signal.Signals) -> None:
        if self._asked.is_set():
            if self._front is not None:
                self._front.kill()
            for child in self._children:
                child.kill()
            os._exit(_EXIT_STATUS_AT_ONCE[number])
        self._signal = number
        self._asked.set()

    def _pass_on(self, number: signal.Signals) -> None:
        if len(self._children) == len(self._commands):
            self._children[-1].signal(number)


def _tell_ends(watched: Mapping[asyncio.Task[str], str]) -> None:
    """Say which ended, and how; the container ends with them."""
    for task, name in watched.items():
        if not task.done():
            continue
        try:
            how = task.result()
        except (ProcessError, OSError, TimeoutError) as error:
            how = str(error) or type(error).__name__
        event(log, logging.ERROR, "container_process_ended", process=name, reason=how)

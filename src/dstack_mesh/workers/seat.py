"""What a worker process has from its supervisor, through the fork."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping

from dstack_mesh import reload
from dstack_mesh.listen import ListeningSocket
from dstack_mesh.settings.tree import Settings
from dstack_mesh.workers.ledger import Ledger
from dstack_mesh.workers.mailbox import Mailbox
from dstack_mesh.workers.shares import Share

READY, ADOPTED, RELOADED, ALIVE = b"r", b"d", b"l", b"a"
"""What a worker tells its supervisor, behind its index, which is one byte."""

LATER_HEARD = (signal.SIGHUP, signal.SIGUSR1)
"""Signals that would end a process that has no handler for them yet."""


class Line:
    """Tells the supervisor how the worker is, as `ops.systemd.Notifier` tells systemd."""

    def __init__(self, descriptor: int, index: int, pulse: float | None, ledger: Ledger) -> None:
        """`pulse` is the time in seconds between signs of life; None: none are asked for."""
        self._descriptor = descriptor
        self.index = index
        self._pulse_every = pulse
        self._ledger = ledger
        self._status: Callable[[], str] = str
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, status: Callable[[], str]) -> None:
        """Give signs of life from `loop`, so that its standstill shows, and `status` with each."""
        self._status = status
        if self._pulse_every is not None:
            self._describe()
            self._say(ALIVE)
            self._timer = loop.call_later(self._pulse_every, self.start, loop, status)

    def ready(self) -> None:
        """Say that every listener is open."""
        self._describe()
        self._say(READY)

    def reloading(self) -> None:
        """Say nothing: it was the supervisor that asked for it."""

    def adopted(self) -> None:
        """Say that the settings read again are in effect."""
        self._say(ADOPTED)

    def reloaded(self) -> None:
        """Say that the reload is over, whatever came of it."""
        self._say(RELOADED)

    def stopping(self) -> None:
        """Say nothing but how it is: that it is to end the supervisor knows."""
        self._describe()

    def close(self) -> None:
        """Give no more signs."""
        if self._timer is not None:
            self._timer.cancel()

    def _describe(self) -> None:
        self._ledger.describe(self.index, self._status())

    def _say(self, what: bytes) -> None:
        with contextlib.suppress(OSError):  # it is gone, or has not read for long: serving goes on
            os.write(self._descriptor, bytes([self.index]) + what)


class Seat:
    """A worker's place: the shared listeners, its line to the supervisor, its siblings."""

    def __init__(
        self,
        sockets: Mapping[str, ListeningSocket],
        line: Line,
        mailbox: Mailbox,
        ledger: Ledger,
        supervisor: int,
        share_of: Callable[[str, Callable[[], int]], Share],
    ) -> None:
        """`supervisor` is a descriptor that ends when the supervisor has.

        `share_of` gives our share of a listener: see `Shares.of`.
        """
        self.sockets = sockets
        self.line = line
        self.mailbox = mailbox
        self.books = ledger.books(line.index)
        self.known_root = ledger.root
        self.share_of = share_of
        self._supervisor = supervisor

    def reload_part(self) -> reload.Part:
        """Give what tells the supervisor that a reload has been put into effect."""

        async def prepare(before: Settings, now: Settings) -> Callable[[], None]:
            return self.line.adopted

        return reload.Part((), prepare)

    def watch_supervisor(self, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
        """Call `ended` when the supervisor is gone, however it went: nobody would replace us.

        To be called when `LATER_HEARD` have their handlers: what came before it waits until here.
        """

        def gone() -> None:
            loop.remove_reader(self._supervisor)
            ended()

        loop.add_reader(self._supervisor, gone)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LATER_HEARD)

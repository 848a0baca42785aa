"""Timeouts by one coarse sweep over open connections, so that no request costs a timer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from dstack_mesh.log import event

log = logging.getLogger(__name__)

NEVER: Final = math.inf


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds allowed; `NEVER` for no limit."""

    head: float = 15.0
    """From a request head's first byte to its last."""
    idle: float = 300.0
    """With no exchange and nothing moving."""
    response: float = 60.0
    """From the request's end to the response's first byte."""
    linger: float = 5.0
    """To let a client read an answer that came before its request had ended."""
    connect: float = 10.0
    """For a connection to become free, or to come about."""

    @property
    def wait(self) -> float:
        """Give how long a request waits in line; an attempt that is too slow tells more."""
        return self.connect + 1.0

    def tick(self) -> float:
        """Give the sweep's period: fine enough for the shortest of them."""
        shortest = min(self.head, self.idle, self.response, self.linger)
        return min(1.0, max(0.02, shortest / 8))


class Expiring(Protocol):
    """Something with a deadline."""

    deadline: float
    """In the worker's time; `NEVER` for none."""

    def expire(self, now: float) -> None:
        """Act on the deadline's having passed."""
        ...


class Deadlines:
    """Sweeps over what it watches and expires what is due."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tick: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._tick = tick
        self._watched: set[Expiring] = set()
        self._handle: asyncio.TimerHandle | None = None

    def watch(self, one: Expiring) -> None:
        """Begin to look at `one.deadline`."""
        self._watched.add(one)
        if self._handle is None:
            self._handle = self._loop.call_later(self._tick, self._sweep)

    def unwatch(self, one: Expiring) -> None:
        """Forget `one`."""
        self._watched.discard(one)

    def close(self) -> None:
        """Stop sweeping."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._watched.clear()

    def _sweep(self) -> None:
        now = self._clock()
        due = [one for one in self._watched if one.deadline <= now]
        for one in due:
            if one.deadline <= now:  # what expired before it may have changed that
                try:
                    one.expire(now)
                except Exception as error:  # one's mistake must not end all timeouts
                    event(log, logging.ERROR, "expire_fault", error=repr(error))
        self._handle = self._loop.call_later(self._tick, self._sweep) if self._watched else None

"""Memory of a process that runs for months: when Python looks for garbage, and what leaves none.

Python frees an object with the last reference to it. The collector is there for objects that refer
to one another in a circle; the loop stands still for it, and the longer the more objects there are.
So connections leave no circles behind (`let_go`), and what others may leave is looked for in small
steps as it comes up, and among all objects when that is short (ADR 11).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
from collections.abc import Callable

_YOUNG = 10_000
"""Objects that come up, less those that went, before the collector looks at these: 1 to 3 ms."""

_MIDDLE = 5
"""Such looks before one at all that came up since: some 10 ms."""

_NEVER = 1_000_000_000

PERIOD = 60.0
"""Seconds between thoughts of a full collection."""

FEW_CONNECTIONS = 500
"""With no more open than these, a full collection takes some 10 ms."""

LATEST = 24 * 3600.0
"""Seconds after which there is a full collection, however many connections are open."""

_NOBODY = asyncio.BufferedProtocol()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 4 * 1024 * 1024
_MMAP_BYTES = 1024 * 1024


def keep_heap() -> None:
    """Have the C library keep some MB of free memory instead of giving them back at once.

    glibc gives the top of the heap back to the system when 128 KB of it are free, and asks for it
    again at the next read of 256 KB: three calls and a page fault each 4 KB, half of what a large
    body costs. Where there is no `mallopt` (mallopt(3)), nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def let_go(transport: asyncio.BaseTransport) -> None:
    """Cut the tie from a transport that has ended to its protocol, which keeps the transport.

    uvloop's TLS has it otherwise for as long as it lives itself, which would be until a full
    collection, and with it some hundred kilobytes of buffers.
    """
    transport.set_protocol(_NOBODY)


class Collector:
    """Decides when this process looks for garbage. There should be one."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, open_connections: Callable[[], int]
    ) -> None:
        self._loop = loop
        self._open_connections = open_connections
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0
        self._before = gc.get_threshold()

    def start(self) -> None:
        """Begin. What is there now will live as long as the process: it is not looked at again."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG, _MIDDLE, _NEVER)
        self._last = self._loop.time()
        self._timer = self._loop.call_later(PERIOD, self._think)

    def stop(self) -> None:
        """Leave everything to Python again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            gc.set_threshold(*self._before)
            gc.unfreeze()

    def _think(self) -> None:
        now = self._loop.time()
        if self._open_connections() <= FEW_CONNECTIONS or now - self._last >= LATEST:
            gc.collect()
            self._last = now
        self._timer = self._loop.call_later(PERIOD, self._think)

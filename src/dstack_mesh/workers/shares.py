"""How many connections each worker has, by listener, in memory that all of them see.

All workers wait on one listening socket, and whoever is awake first takes what comes: of 64
connections that stay, one worker may well get 60. So one that has clearly more than another leaves
the next to it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

_NOBODY = 0xFFFF_FFFF
"""In place of a number: who was here does not accept."""

_BYTES = 4


class Shares:
    """The numbers of all, made before there are workers."""

    def __init__(self, workers: int, listeners: Sequence[str]) -> None:
        self._workers = workers
        self._listeners = list(listeners)
        memory = mmap.mmap(-1, max(1, workers * len(self._listeners)) * _BYTES)
        self._numbers = memoryview(memory).cast("I")
        for index in range(workers):
            self.clear(index)

    def clear(self, index: int) -> None:
        """Expect nothing of this worker: it has ended."""
        for place in range(len(self._listeners)):
            self._numbers[place * self._workers + index] = _NOBODY

    def of(self, index: int, listener: str, count: Callable[[], int]) -> Share:
        """Give this worker's share of a listener; `count` tells how many connections it has."""
        start = self._listeners.index(listener) * self._workers
        return Share(self._numbers[start : start + self._workers], index, count)


class Share:
    """One worker's share of one listener: see `relay.accept.Share`."""

    def __init__(self, numbers: memoryview[int], index: int, count: Callable[[], int]) -> None:
        self._numbers = numbers
        self._index = index
        self._count = count

    def is_others_turn(self) -> bool:
        """Tell ours, and whether another worker has so much less that the next is for it."""
        own = self._numbers[self._index] = self._count()
        least = min(self._numbers)  # nobody's is larger than any
        return own > least + 1 + least // 8

    def leave(self) -> None:
        """Take no part any more."""
        self._numbers[self._index] = _NOBODY

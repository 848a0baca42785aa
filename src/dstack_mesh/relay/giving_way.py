"""Which connection gives way to a newcomer: that which has waited longest for a request (ADR 8)."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from typing import Protocol, TypeVar

from dstack_mesh.relay.deadlines import NEVER

BATCH = 64
"""Connections found by one look at all of them, which takes some milliseconds for 10,000."""

_LOOK_AGAIN = 0.1
"""Seconds, where a look has found fewer."""


class Waiting(Protocol):
    """A connection that may be waiting for a request."""

    def waiting_since(self) -> float:
        """Give since when, in the worker's time; `NEVER` where it is busy, or about to end."""
        ...


C = TypeVar("C", bound=Waiting)


class LongestWaiting:
    """Finds connections, one after the other, the longest waiting first."""

    __slots__ = ("_look_at", "_next")

    def __init__(self) -> None:
        self._next: list[tuple[float, Waiting]] = []
        self._look_at = -NEVER

    def find(self, connections: Collection[C], now: float, patience: float) -> C | None:
        """Give the connection that has waited longest, and for at least `patience` seconds."""
        while True:
            while self._next:
                since, one = self._next.pop()
                if one in connections and one.waiting_since() == since:
                    return one  # type: ignore[return-value]  # it is one of `connections`
            if now < self._look_at:
                return None
            self._look(connections, now - patience)
            if len(self._next) < BATCH:
                self._look_at = now + _LOOK_AGAIN

    def _look(self, connections: Collection[Waiting], latest: float) -> None:
        waiting = [(one.waiting_since(), one) for one in connections]
        ripe = [entry for entry in waiting if entry[0] <= latest]
        self._next = heapq.nsmallest(BATCH, ripe, key=_since)
        self._next.reverse()


def _since(entry: tuple[float, Waiting]) -> float:
    return entry[0]

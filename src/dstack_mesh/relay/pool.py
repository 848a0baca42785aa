"""All destinations of a worker, each with its lane of connections."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.upstream import Connector
from dstack_mesh.relay.worker import Worker

MAX_LANES = 1024
"""Destinations that are kept though no connection to them is open."""


class Pool:
    """Lanes by destination. Many targets cost no more memory than their open connections."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lanes: dict[Hashable, Lane] = {}

    def lane(self, key: Hashable, make: Callable[[], Connector]) -> Lane:
        """Give the connections to `key`; `make` makes the connector of a new destination."""
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) >= MAX_LANES:
                self._retire_unused()
            lane = self._lanes[key] = Lane(self._worker, make())
        return lane

    def drain(self) -> None:
        """Close the idle connections that may not be used any more, as after a renewal."""
        for lane in list(self._lanes.values()):
            lane.drain()

    def close(self) -> None:
        """Give up what is being opened."""
        for lane in self._lanes.values():
            lane.close()

    def _retire_unused(self) -> None:
        for key, lane in list(self._lanes.items()):
            if not lane.in_use:
                lane.retired = True
                del self._lanes[key]

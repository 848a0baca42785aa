"""All destinations of a worker, each with its lane of connections."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

from dstack_mesh.relay.upstream import Connector, Lane
from dstack_mesh.relay.worker import Worker


class Pool:
    """Lanes by destination. A lane lives while a connection or a remembered head refers to it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lanes: weakref.WeakValueDictionary[Hashable, Lane] = weakref.WeakValueDictionary()

    def lane(self, key: Hashable, make: Callable[[], Connector]) -> Lane:
        """Give the connections to `key`; `make` makes the connector of a new destination."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(self._worker, make())
        return lane

    def drain(self) -> None:
        """Close the idle connections that may not be used any more, as after a renewal."""
        for lane in list(self._lanes.values()):
            lane.drain()

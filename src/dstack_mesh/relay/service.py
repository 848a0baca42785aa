"""A listener's connections: their limit, their record, their end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from dstack_mesh.log import event
from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.giving_way import LongestWaiting
from dstack_mesh.relay.interfaces import Client, Handler, Listener, P
from dstack_mesh.relay.tally import Tally
from dstack_mesh.relay.worker import Worker

log = logging.getLogger(__name__)

_ABORT_SECONDS = 1.0

_QUIET = 60.0
"""Seconds between two log events on the limit: a flood must not become one of the log."""

Recorder = Callable[[str, Exchange], None]
"""Called once for each exchange, with its direction, when it has ended."""


class Service(Listener):
    """All connections that one listener has accepted and that are still open."""

    def __init__(
        self,
        worker: Worker,
        direction: str,
        *,
        max_connections: int,
        tally: Tally | None = None,
        record: Recorder | None = None,
    ) -> None:
        """Exchanges are counted in `tally`, and told to `record`, where there are such."""
        super().__init__(worker)
        self.direction = direction
        self._tally = tally
        self.connections: set[Client] = set()
        self._max_connections = max_connections
        self._record = record
        self._empty = asyncio.Event()
        self._empty.set()
        self._longest_waiting = LongestWaiting()
        self._refused = self._gave_way = 0
        self._said = -_QUIET

    def protocol(self, handler: Handler[P]) -> Downstream[P]:
        """Make the protocol of one accepted connection."""
        return Downstream(self, handler)

    def has_room(self) -> bool:
        """Tell whether another connection is within the limit."""
        return len(self.connections) < self._max_connections

    def give_way(self) -> bool:
        """End the connection that has waited longest for a request, to have room for another.

        `False` where none has waited for longer than a head may take: who has just come may be
        about to ask.
        """
        worker = self.worker
        now = worker.clock()
        one = self._longest_waiting.find(self.connections, now, worker.timeouts.head)
        if one is None:
            return False
        self.connections.discard(one)  # its transport tells only in the loop's next turn
        one.expire(now)
        self._gave_way += 1
        self._limit_reached(now)
        return True

    def refused(self) -> None:
        """Count a connection that there was no room for."""
        self._refused += 1
        self._limit_reached(self.worker.clock())

    def _limit_reached(self, now: float) -> None:
        if now - self._said < _QUIET:
            return
        self._said = now
        event(
            log,
            logging.WARNING,
            "connections_at_limit",
            listener=self.direction,
            open=len(self.connections),
            limit=self._max_connections,
            setting="MESH_MAX_CONNECTIONS",
            refused=self._refused,
            gave_way=self._gave_way,
        )

    async def drain(self) -> None:
        """Close idle connections, and wait until the others have finished their exchange."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()
        await self._empty.wait()

    def abort(self) -> None:
        """Cut every connection."""
        for connection in list(self.connections):
            connection.cut()

    async def gone(self) -> None:
        """Wait until every connection that was cut has gone.

        An exchange whose client is still there when its upstream goes may open another one.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABORT_SECONDS):
                await self._empty.wait()

    # What connections call: see `downstream.Listener`.

    def opened(self, connection: Client) -> bool:
        """Enter a connection in the books; `False` when there is no room for it."""
        if not self.has_room() and not self.give_way():
            self.refused()
            return False
        self.connections.add(connection)
        self._empty.clear()
        return True

    def closed(self, connection: Client) -> None:
        """Take a connection off the books."""
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def record(self, exchange: Exchange) -> None:
        """Record an exchange that has ended."""
        if self._tally is not None:
            self._tally.add(
                exchange.line.method,
                exchange.status,
                exchange.code,
                exchange.bytes_up,
                exchange.bytes_down,
                exchange.finished - exchange.started,
            )
        if self._record is not None:
            self._record(self.direction, exchange)

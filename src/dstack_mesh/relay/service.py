"""A listener's connections: their limit, their record, their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.interfaces import Client, Handler, Listener, P
from dstack_mesh.relay.tally import Tally
from dstack_mesh.relay.worker import Worker

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

    def protocol(self, handler: Handler[P]) -> Downstream[P]:
        """Make the protocol of one accepted connection."""
        return Downstream(self, handler)

    def has_room(self) -> bool:
        """Tell whether another connection is within the limit."""
        return len(self.connections) < self._max_connections

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

    # What connections call: see `downstream.Listener`.

    def opened(self, connection: Client) -> bool:
        """Enter a connection in the books; `False` when there is no room for it."""
        if not self.has_room():
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

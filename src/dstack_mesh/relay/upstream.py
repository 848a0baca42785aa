"""A connection to where requests go."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from dstack_mesh.errors import MeshError
from dstack_mesh.memory import let_go
from dstack_mesh.model import PeerIdentity
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.stream import StreamProtocol, left_unread

if TYPE_CHECKING:
    from dstack_mesh.relay.lane import Lane

_WRITE_HIGH_WATER: Final = 128 * 1024
"""Bytes a transport may hold before its source is paused."""


class Waiter:
    """A request that waits for a connection."""

    __slots__ = ("ended", "fresh_only")

    def __init__(self) -> None:
        self.fresh_only = False
        """Whether a connection that was used before will not do: the request is sent again."""
        self.ended = False
        """Whether the request has come to its end, and wants nothing any more."""

    def connected(self, upstream: Upstream) -> None:
        """Take the connection."""
        raise NotImplementedError

    def not_connected(self, error: MeshError) -> None:
        """Learn that there will be none."""
        raise NotImplementedError


class ResponseSink(Waiter):
    """What an upstream connection tells the exchange that it carries."""

    __slots__ = ()

    def response_data(self, data: bytes) -> None:
        """Take what was read."""
        raise NotImplementedError

    def upstream_lost(self, upstream: Upstream, exc: Exception | None) -> None:
        """Learn that the connection is gone; `upstream.clean_end` tells how."""
        raise NotImplementedError

    def upstream_writable(self, writable: bool) -> None:
        """Pause or resume the request's source."""
        raise NotImplementedError


class Connector:
    """Opens connections to one destination, ready to carry requests."""

    __slots__ = ()

    async def connect(self, lane: Lane) -> Upstream:
        """Open a connection; for a mesh target, verified. Raises a `MeshError`."""
        raise NotImplementedError

    def lost(self, exc: Exception | None) -> MeshError:
        """Name the error of a connection that ended before a response began."""
        raise NotImplementedError

    def forgotten(self, upstream: Upstream) -> None:
        """Learn that a connection that was ready is gone."""

    def generation(self) -> int:
        """Give the number that a connection must have been made under to be used again."""
        raise NotImplementedError


class Upstream(StreamProtocol):
    """The client's end of one HTTP/1.1 connection. Carries one exchange at a time."""

    __slots__ = (
        "admitted",
        "clean_end",
        "deadline",
        "exchange",
        "expires_at",
        "failure",
        "generation",
        "gone",
        "lane",
        "not_after",
        "peer",
        "reused",
        "transport",
        "writable",
    )

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.transport: Any = None
        self.exchange: ResponseSink | None = None
        self.writable = True
        self.clean_end = False
        """Whether the peer ended the connection in order: FIN, or TLS's close-notify."""
        self.gone = False
        """Whether the connection has ended, and `failure` tells by what; None: nothing special."""
        self.failure: Exception | None = None
        self.admitted = False
        self.reused = False
        self.deadline = NEVER
        self.expires_at = NEVER
        self.not_after = NEVER
        """Seconds since 1970 at which the peer's identity ends."""
        self.peer: PeerIdentity | None = None
        self.generation = 0

    def admit(self, peer: PeerIdentity | None, generation: int) -> None:
        """Declare the connection ready for requests, its peer verified where it has one."""
        self.peer = peer
        self.generation = generation
        if peer is not None:
            self.not_after = peer.not_after
        if not self.gone:
            self.lane.open += 1
            self.admitted = True
            self.lane.worker.admit_upstream(self)

    def usable(self, now: float, generation: int) -> bool:
        """Tell whether the pooled connection may carry another request."""
        return (
            self.generation == generation
            and now < self.expires_at
            and not self.transport.is_closing()
            and (self.not_after == NEVER or time.time() < self.not_after)
        )

    def write(self, data: bytes) -> None:
        """Send to the server; nothing once the connection is on its way out."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """End the connection once what was written is sent, if that does not take forever."""
        worker = self.lane.worker
        self.deadline = worker.clock() + worker.timeouts.idle
        self.transport.close()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self.transport = transport
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        """Hand what was read to the exchange; bytes nobody asked for end the connection."""
        exchange = self.exchange
        if exchange is None:
            self.transport.abort()
        else:
            exchange.response_data(data)

    def eof_received(self) -> bool:
        """Note the orderly end; the transport closes itself."""
        self.clean_end = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the exchange, or leave the pool."""
        try:
            if self.exchange is not None:
                last = left_unread(self.transport, exc)
                if last:
                    self.exchange.response_data(last)
        finally:
            self._lost(exc)

    def _lost(self, exc: Exception | None) -> None:
        self.gone, self.failure = True, exc
        self.lane.forget(self)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.upstream_lost(self, exc)
        let_go(self.transport)

    def pause_writing(self) -> None:
        """Pause the request's source."""
        self.writable = False
        if self.exchange is not None:
            self.exchange.upstream_writable(False)

    def resume_writing(self) -> None:
        """Let the request's source go on."""
        self.writable = True
        if self.exchange is not None:
            self.exchange.upstream_writable(True)

    # What the sweep calls.

    def expire(self, now: float) -> None:
        """Close a connection that was idle for too long; cut one that does not come to close."""
        self.deadline = NEVER
        if self.transport.is_closing():
            self.transport.abort()
        elif self.exchange is None:
            self.close()

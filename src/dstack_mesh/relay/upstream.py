"""Connections to where requests go, and the idle ones of each destination."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from dstack_mesh.errors import MeshError
from dstack_mesh.model import PeerIdentity
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.stream import StreamProtocol
from dstack_mesh.relay.tally import PeerTally, Tally
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.translate import ResponseRules

_WRITE_HIGH_WATER: Final = 128 * 1024
"""Bytes a transport may hold before its source is paused."""


class ResponseSink:
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
            and (self.not_after is NEVER or time.time() < self.not_after)
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
        self.gone, self.failure = True, exc
        self.lane.forget(self)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.upstream_lost(self, exc)

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


class Lane:
    """The connections to one destination: most recently used first."""

    __slots__ = ("connector", "idle", "open", "peer", "retired", "tally", "worker")

    def __init__(
        self,
        worker: Worker,
        connector: Connector,
        tally: Tally | None = None,
        peer: PeerTally | None = None,
    ) -> None:
        self.worker = worker
        self.connector = connector
        self.tally = tally
        """Where exchanges that go this way are counted; None: where their listener's are."""
        self.peer = peer
        """Where those that go to this peer are counted; None where it is no app."""
        self.idle: list[Upstream] = []
        self.open = 0
        """Connections, idle and busy."""
        self.retired = False
        """Whether the pool has let go of the lane: whoever remembers it should ask again."""

    def take(self, now: float) -> Upstream | None:
        """Give an idle connection that may be used, if there is one."""
        idle = self.idle
        if not idle:
            return None
        generation = self.connector.generation()
        while idle:
            upstream = idle.pop()
            upstream.deadline = NEVER
            if upstream.usable(now, generation):
                upstream.reused = True
                return upstream
            upstream.transport.close()
        return None

    def release(self, upstream: Upstream, now: float) -> None:
        """Take back a connection whose exchange ended well."""
        if upstream.usable(now, self.connector.generation()) and not self.retired:
            upstream.deadline = min(now + self.worker.upstream_idle, upstream.expires_at)
            self.idle.append(upstream)
        else:
            upstream.transport.close()

    def forget(self, upstream: Upstream) -> None:
        """Drop a connection that is gone."""
        if upstream.admitted:
            self.open -= 1
        self.worker.forget_upstream(upstream)
        if upstream.exchange is None and upstream in self.idle:
            self.idle.remove(upstream)

    def drain(self) -> None:
        """Close the idle connections that may not be used any more."""
        now = self.worker.clock()
        generation = self.connector.generation()
        stale = [one for one in self.idle if not one.usable(now, generation)]
        for one in stale:
            self.idle.remove(one)
            one.transport.close()


class Route:
    """Where a request goes and how it is to look there."""

    __slots__ = ("head", "lane", "remove_trailers", "rules")

    def __init__(
        self, lane: Lane, head: bytes, rules: ResponseRules, remove_trailers: frozenset[bytes]
    ) -> None:
        self.lane = lane
        self.head = head
        """The complete head to send, blank line included."""
        self.rules = rules
        self.remove_trailers = remove_trailers

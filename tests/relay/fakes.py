"""The data plane over transports in memory: each state is reached by one call, in a known order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from dstack_mesh.errors import MeshError, UpstreamClosed
from dstack_mesh.model import AppId, PeerIdentity
from dstack_mesh.relay.deadlines import NEVER, Timeouts
from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.interfaces import Decision, Handler, Plan
from dstack_mesh.relay.lane import Lane, Route
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.stream import StreamProtocol
from dstack_mesh.relay.upstream import Connector, Upstream
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import RequestLine
from dstack_mesh.wire.translate import ResponseRules

RULES = ResponseRules(remote_errors=False)
REMOVE = frozenset((b"x-own",))
TIMEOUTS = Timeouts()

READ_BYTES = 256_000
"""What an event loop reads at once."""

GET_1 = b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class FakeSocket:
    """Remembers the options set."""

    def __init__(self) -> None:
        self.options: list[tuple[object, ...]] = []

    def setsockopt(self, *option: object) -> None:
        self.options.append(option)

    def fileno(self) -> int:
        return -1  # nothing is to be read from it


class FakeTransport(asyncio.Transport):
    """One end of a connection. What the other end does is a method of the test's side below."""

    def __init__(self, protocol: StreamProtocol, *, tls: bool = False) -> None:
        super().__init__()
        self.protocol = protocol
        self.sent = bytearray()
        """All that was written and has not been taken by the test."""
        self.writes = 0
        self.reading = True
        self.aborted = False
        self.ended = False
        """Whether our side has finished sending."""
        self.lost = False
        self.sock = FakeSocket()
        self._tls = tls
        self._closing = False
        self._stalled = False
        self._full = False
        self._high = 64 * 1024
        self._held = 0
        self._arrived: list[bytes | None] = []
        self.extra: dict[str, Any] = {"socket": self.sock}

    # What protocols call.

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.extra.get(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        self._high = high

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert self.lost, "only then is there nobody left to tell"

    def get_write_buffer_size(self) -> int:
        return self._held

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert isinstance(data, bytes), "a transport may keep what it was given"
        assert not self._closing, "written to after the end"
        assert not self.ended
        self.sent += data
        self.writes += 1
        if self._stalled:
            self._held += len(data)
            if self._held > self._high and not self._full:
                self._full = True
                self.protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return not self._tls

    def write_eof(self) -> None:
        assert not self._tls
        assert not self._closing
        self.ended = True

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._lose, None)

    def abort(self) -> None:
        if not self._closing:
            self.aborted = True
        self.close()

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        assert not self._closing
        self.reading = False

    def resume_reading(self) -> None:
        assert not self._closing
        self.reading = True
        asyncio.get_running_loop().call_soon(self._deliver)

    # What the other end does.

    def receive(self, data: bytes) -> None:
        """Have `data` arrive; it waits while the protocol does not read."""
        self._arrived.append(data)
        self._deliver()

    def receive_eof(self) -> None:
        """Have the other end finish sending, in order."""
        self._arrived.append(None)
        self._deliver()

    def break_off(self, exc: Exception | None = None) -> None:
        """Lose the connection, out of order."""
        self._closing = True
        self._lose(exc or ConnectionResetError("reset"))

    def stall(self) -> None:
        """Take nothing more of what is written."""
        self._stalled = True

    def flow(self) -> None:
        """Take everything again."""
        self._stalled, self._held = False, 0
        if self._full:
            self._full = False
            self.protocol.resume_writing()

    def take(self) -> bytes:
        """Give what was written since the last call."""
        data, self.sent = bytes(self.sent), bytearray()
        return data

    @property
    def waiting(self) -> int:
        """Bytes that have arrived and were not read."""
        return sum(len(data) for data in self._arrived if data is not None)

    def _deliver(self) -> None:
        while self._arrived and self.reading and not self._closing:
            data = self._arrived.pop(0)
            if data is None:
                if not self.protocol.eof_received():
                    self.close()
                return
            piece, rest = data[:READ_BYTES], data[READ_BYTES:]
            if rest:
                self._arrived.insert(0, rest)
            self.protocol.data_received(piece)

    def _lose(self, exc: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(exc)


class FakeConnector(Connector):
    """Connects when the test says so, to connections that the test holds the other end of."""

    def __init__(self) -> None:
        self.number = 1
        """The generation of our identity."""
        self.peer: PeerIdentity | None = None
        self.asked: list[tuple[Lane, asyncio.Future[None]]] = []
        self.opened: list[FakeTransport] = []
        self.tls = False
        self.die_at_once = False
        self.stalled = False

    async def connect(self, lane: Lane) -> Upstream:
        wanted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = self.number
        self.asked.append((lane, wanted))
        await wanted
        upstream = Upstream(lane)
        transport = FakeTransport(upstream, tls=self.tls)
        upstream.connection_made(transport)
        if self.stalled:
            transport.stall()
        self.opened.append(transport)
        if self.die_at_once:
            transport.break_off()
        upstream.admit(self.peer, number)
        return upstream

    def lost(self, exc: Exception | None) -> MeshError:
        return UpstreamClosed(f"lost: {exc}")

    def generation(self) -> int:
        return self.number


class FakePlan(Plan):
    pass


class FakeHandler(Handler[FakePlan]):
    """Routes everything to one lane, or does what the test puts into `decide`."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.persist = True
        self.connections: list[asyncio.Transport] = []
        self.planned: list[RequestLine] = []
        self.decide: Callable[[RequestLine], Decision] | None = None

    def connected(self, transport: asyncio.Transport) -> None:
        self.connections.append(transport)

    def may_persist(self) -> bool:
        return self.persist

    def plan(self, line: RequestLine, block: bytes) -> FakePlan:
        self.planned.append(line)
        return FakePlan(parse_request_fields(block, line.minor, REMOVE, line.authority))

    def route(self, line: RequestLine, plan: FakePlan, last: Route | None = None) -> Decision:
        if self.decide is not None:
            return self.decide(line)
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (line.method, line.target, plan.fields.forwarded)
        return Route(self.lane, head, RULES, REMOVE)


class Rig:
    """A listener with one client, and a destination."""

    def __init__(self, timeouts: Timeouts = TIMEOUTS, *, max_connections: int = 10) -> None:
        self.records: list[Exchange] = []
        self.worker = Worker(asyncio.get_running_loop(), timeouts)
        self.service = Service(
            self.worker,
            "outbound",
            max_connections=max_connections,
            record=lambda _, exchange: self.records.append(exchange),
        )
        self.connector = FakeConnector()
        self.lane = Lane(self.worker, self.connector)
        self.handler = FakeHandler(self.lane)
        self.downstreams: list[Downstream[FakePlan]] = []
        self.client = self.accept()

    def accept(self, *, tls: bool = False) -> FakeTransport:
        """Have another client connect."""
        downstream = self.service.protocol(self.handler)
        transport = FakeTransport(downstream, tls=tls)
        downstream.connection_made(transport)
        self.downstreams.append(downstream)
        return transport

    @property
    def downstream(self) -> Downstream[FakePlan]:
        return self.downstreams[0]

    @property
    def upstream(self) -> FakeTransport:
        """The other end of the connection opened last."""
        return self.connector.opened[-1]

    async def connect(self, error: BaseException | None = None) -> FakeTransport:
        """Let the connection asked for come about, or fail."""
        await self.turn()
        _, wanted = self.connector.asked.pop(0)
        if error is None:
            wanted.set_result(None)
        else:
            wanted.set_exception(error)
        await self.turn()
        return self.connector.opened[-1] if error is None else self.client

    async def turn(self) -> None:
        """Let everything that is due happen."""
        for _ in range(8):
            await asyncio.sleep(0)

    async def exchange(self, request: bytes, response: bytes) -> FakeTransport:
        """Carry one whole exchange, on a pooled connection where there is one."""
        self.client.receive(request)
        await self.turn()
        transport = await self.connect() if self.connector.asked else self.upstream
        transport.receive(response)
        await self.turn()
        return transport


@contextlib.asynccontextmanager
async def rig(timeouts: Timeouts = TIMEOUTS, *, max_connections: int = 10) -> AsyncIterator[Rig]:
    """Open a rig, and leave nothing of it running."""
    made = Rig(timeouts, max_connections=max_connections)
    try:
        yield made
    finally:
        made.service.abort()
        made.worker.close()
        for _, wanted in made.connector.asked:
            wanted.cancel()
        await made.turn()


@dataclass
class Opened:
    """A connection, and the test's end of it."""

    upstream: Upstream
    transport: FakeTransport


def open_one(
    one: Rig, *, generation: int = 1, not_after: float = NEVER, idle: bool = False
) -> Opened:
    """Open a connection to the rig's destination, without its connector."""
    upstream = Upstream(one.lane)
    transport = FakeTransport(upstream)
    upstream.connection_made(transport)
    upstream.admit(PeerIdentity(AppId("a" * 40), not_after), generation)
    if idle:
        one.lane.release(upstream, one.worker.clock())
        assert one.lane.idle[-1] is upstream
    return Opened(upstream, transport)

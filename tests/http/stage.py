"""Real sidecars between a client of bare bytes and an origin that keeps every byte that arrives."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from dstack_mesh.model import AppId, TcpAddress
from dstack_mesh.relay.service import Service
from tests.http.corpus import Message
from tests.http.exchange import Got, Sent, Told, head_ends, read_requests, read_responses
from tests.integration.harness import mesh
from tests.integration.tls_peers import caller_context

CALLER = AppId("cc" * 20)
TARGET = AppId("dd" * 20)
OUT, IN = "out", "in"
_PATIENCE = 10.0
_ONE_READ = 16 * 1024
"""What comes in one TLS record."""


async def soon(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until `condition` holds, which mostly takes some turns of the loop; else fail."""
    end = asyncio.get_running_loop().time() + seconds
    turns = 0
    while not condition():
        assert asyncio.get_running_loop().time() < end, "the condition did not come true in time"
        turns += 1
        await asyncio.sleep(0 if turns < 50 else 0.001)


class Arrivals(asyncio.Protocol):
    """One connection at the origin: it counts requests, and answers each whole one."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._transport: asyncio.Transport | None = None
        self.received = b""
        self.open = True
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # the loop's own kind of it
        self._origin.connections.append(self)

    def data_received(self, data: bytes) -> None:
        self.received += data
        try:
            whole, self._rest = read_requests(self._rest + data)
        except Exception as error:
            self._origin.faults.append(repr(error))
            self.cut()
            return
        for one in whole:
            answer = self._origin.answer(one)
            assert self._transport is not None
            self._transport.write(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False

    def cut(self) -> None:
        if self._transport is not None and self.open:
            self._transport.abort()


class Origin:
    """The next hop: a mesh target, or a backend."""

    def __init__(self) -> None:
        self.connections: list[Arrivals] = []
        self.bodies: list[bytes] = []
        """Of the answers given, each unlike all others, in their order."""
        self.faults: list[str] = []
        self._server: asyncio.Server | None = None

    async def start(self, tls: ssl.SSLContext | None = None) -> TcpAddress:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Arrivals(self), "127.0.0.1", 0, ssl=tls)
        return TcpAddress(*self._server.sockets[0].getsockname()[:2])

    def answer(self, request: Sent) -> bytes:
        body = b"answer %d to %b %b" % (len(self.bodies), request.method, request.target)
        self.bodies.append(body)
        head = b"HTTP/1.1 200 OK\r\nX-Origin: y\r\nContent-Length: %d\r\n\r\n" % len(body)
        return head if request.method == b"HEAD" else head + body

    def mark(self) -> dict[Arrivals, int]:
        """Remember how much has come on each connection."""
        return {one: len(one.received) for one in self.connections}

    def since(self, mark: dict[Arrivals, int]) -> list[tuple[Arrivals, bytes]]:
        """Give the connections on which something has come since, and what."""
        come = [(one, one.received[mark.get(one, 0) :]) for one in self.connections]
        return [(one, data) for one, data in come if data]

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        for one in self.connections:
            one.cut()
        await soon(lambda: not any(one.open for one in self.connections))


@dataclass
class Side:
    """One direction through one sidecar."""

    direction: str
    listener: TcpAddress
    service: Service
    origin: Origin
    host: bytes
    """What the mesh puts in where a client sent no Host."""
    tls: ssl.SSLContext | None = None
    _pooled: Arrivals | None = None

    def request(self, data: bytes) -> bytes:
        """Write the placeholders of the second column out."""
        line = b"x-dstack-target-app: %b\r\n" % TARGET.encode() if self.direction == OUT else b""
        data = data.replace(b"{id}", TARGET.encode())
        if b"{T}" in data or b"{-}" in data:
            return data.replace(b"{T}", line).replace(b"{-}", b"")
        head, crlf, rest = data.partition(b"\r\n")
        return head + crlf + (line if crlf else b"") + rest

    def expected(self, data: bytes) -> bytes:
        """Write the placeholders of the third column out, and the mesh's own field lines in."""
        data = data.replace(b"{host}", self.host)
        if self.direction == OUT:
            return data
        own = b"127.0.0.1\r\nx-forwarded-proto: https\r\nx-real-ip: 127.0.0.1\r\n"
        own += b"x-dstack-app-id: %b\r\n" % CALLER.encode()
        if b"{own}" in data:
            return data.replace(b"{own}", own)
        for end in reversed(head_ends(data)):
            data = data[:end] + b"x-forwarded-for: " + own + data[end:]
        return data

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Peer]:
        """Open a client's connection."""
        address = self.listener
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=self.tls)
        try:
            yield Peer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def at_rest(self) -> None:
        """Wait until no client is connected."""
        await soon(lambda: not self.service.connections)

    async def probe(self, path: bytes = b"/probe") -> Arrivals:
        """Have one plain exchange on a new connection; give the origin's connection it came by."""
        sent = b"GET %b HTTP/1.1\r\nHost: probe\r\n\r\n" % path
        mark, answers = self.origin.mark(), len(self.origin.bodies)
        async with self.connect() as peer:
            await peer.send(self.request(sent))
            got = await peer.answers(1, [b"GET"])
            assert peer.rest == b""
        [(arrivals, data)] = self.origin.since(mark)
        assert data == self.expected(sent)
        assert [one.body for one in got] == self.origin.bodies[answers:]
        self._pooled = arrivals
        return arrivals

    async def pooled(self) -> Arrivals:
        """Give the origin's connection that the next request will be given."""
        if self._pooled is None or not self._pooled.open:
            return await self.probe()
        return self._pooled


class Peer:
    """A client's connection: bytes out, responses in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.received = b""
        self.rest = b""
        """What came behind the answers that were read last."""
        self.ended = False
        self._reading: asyncio.Task[bytes] | None = None

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answers(self, count: int, methods: list[bytes]) -> list[Got]:
        """Read until `count` answers are there."""
        got, self.rest = read_responses(self.received, methods)
        async with asyncio.timeout(_PATIENCE):
            while len(got) < count and await self._read():
                got, self.rest = read_responses(self.received, methods)
        return got

    async def to_end(self) -> None:
        """Read until the connection ends, whichever way."""
        async with asyncio.timeout(_PATIENCE):
            while await self._read():
                pass

    def came(self) -> bytes:
        """Give what has come by now, without waiting for more."""
        buffered: bytearray = self._reader._buffer  # type: ignore[attr-defined]
        return self.received + bytes(buffered)

    async def _read(self) -> bool:
        try:
            data = await self._reader.read(65536)
        except ConnectionError:
            data = b""
        self.received += data
        self.ended = not data
        return not self.ended


@contextlib.asynccontextmanager
async def stage(directory: Path) -> AsyncIterator[Callable[[str], Side]]:
    """Start `a`, whose target is an origin of bare bytes, and `b`, whose backend is another."""
    target, backend = Origin(), Origin()
    async with mesh(directory) as one:
        kms = one.world.kms
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        kms.issue(TARGET).load_into(tls)
        fixed = {
            "MESH_GATEWAY": f"fixed/{await target.start(tls)}",
            "MESH_GATEWAY_CONNECT": "unset",
        }
        behind = await backend.start()
        a = await one.start("a", backend=False, **fixed)
        b = await one.start("b", MESH_BACKEND=str(behind))
        port = one.app("a").env["MESH_DEFAULT_PORT"]
        sides = {
            OUT: Side(OUT, one.outbound("a"), a._outbound, target, f"{TARGET}-{port}s".encode()),
            IN: Side(
                IN,
                one.inbound("b"),
                b._inbound,
                backend,
                str(behind).encode(),
                caller_context(kms.root_pem, kms.issue(CALLER)),
            ),
        }
        try:
            yield sides.__getitem__
        finally:
            await target.aclose()
            await backend.aclose()


def check(what: str, found: object, wanted: object) -> None:
    """Fail with both values, which pytest does not show for a module that is no test."""
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, and not {wanted!r}")


async def run(side: Side, row: Message) -> None:
    """Send one row as it stands, and hold everything that happens against the table."""
    side.origin.faults.clear()
    told, expected = Told.parse(row.told), side.expected(row.passed_on)
    whole, part = read_requests(expected)
    methods = [one.method for one in whole]
    before = await side.pooled()
    mark, answers = side.origin.mark(), len(side.origin.bodies)
    async with side.connect() as peer:
        await peer.send(side.request(row.sent))
        got = await peer.answers(len(told.answers), methods)
        check("answers", [(one.status, one.code) for one in got], told.answers)
        check("bytes behind the answers", peer.rest, b"")
        if body_refused(row) and len(row.sent) > _ONE_READ:
            await _never_whole(side.origin, mark)
        else:
            await _arrives(side.origin, mark, expected)
        _check_bodies(got, methods, side.origin.bodies[answers:])
        carried = side.origin.since(mark)
        assert len(carried) <= 1, "one client's requests in turn need one connection"
        if told.end == "close":
            await _closes(side, peer, got, methods)
        elif told.end == "waits":
            await _waits(side, peer)
        else:
            await _serves_on(side, peer, len(got), methods)
    await side.at_rest()
    check("bytes that no mesh may write", side.origin.faults, [])
    await _pooled_or_not(side, before, carried, broken=bool(part) or body_refused(row))


async def _arrives(origin: Origin, mark: dict[Arrivals, int], expected: bytes) -> None:
    with contextlib.suppress(AssertionError):
        await soon(lambda: b"".join(d for _, d in origin.since(mark)) == expected, 5.0)
    check("bytes at the next hop", b"".join(data for _, data in origin.since(mark)), expected)


async def _never_whole(origin: Origin, mark: dict[Arrivals, int]) -> None:
    """What came before the fault in other reads has gone on, but not as a message."""
    await soon(lambda: not any(one.open for one, _ in origin.since(mark)))
    for _, data in origin.since(mark):
        check("whole messages at the next hop", read_requests(data)[0], [])


def _check_bodies(got: list[Got], methods: list[bytes], bodies: list[bytes]) -> None:
    """Each answer of the origin is the one to the request in its place."""
    own = [one.body for one in got if one.by_the_origin]
    pairs = zip(methods, bodies, strict=True)
    check("the origin's answers", own, [b"" if m == b"HEAD" else body for m, body in pairs])


async def _closes(side: Side, peer: Peer, got: list[Got], methods: list[bytes]) -> None:
    """What the client sends from here on is never taken for a request."""
    assert got[-1].fields[b"connection"] == b"close"
    assert all(b"connection" not in one.fields for one in got[:-1])
    mark = side.origin.mark()
    with contextlib.suppress(ConnectionError):
        await peer.send(side.request(b"GET /late HTTP/1.1\r\nHost: late\r\n\r\n"))
    if side.tls is None or not got[-1].code:
        await peer.to_end()
    else:  # TLS has no half-close here: the mesh waits for the client to have read its answer
        await side.probe()
    again, rest = read_responses(peer.came(), methods)
    assert (again, rest) == (got, b""), "something was answered behind the close"
    assert not any(b"/late" in data for _, data in side.origin.since(mark))


async def _waits(side: Side, peer: Peer) -> None:
    await side.probe()
    assert peer.rest == b""
    assert not peer.ended
    assert peer.came() == peer.received, "something was answered though the message is incomplete"


async def _serves_on(side: Side, peer: Peer, count: int, methods: list[bytes]) -> None:
    """The connection is in step: the next request gets its own answer."""
    sent = b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n"
    mark = side.origin.mark()
    await peer.send(side.request(sent))
    got = await peer.answers(count + 1, [*methods, b"GET"])
    assert got[-1].body == side.origin.bodies[-1]
    assert got[-1].body.endswith(b" to GET /next")
    assert [data for _, data in side.origin.since(mark)] == [side.expected(sent)]


async def _pooled_or_not(
    side: Side, before: Arrivals, carried: list[tuple[Arrivals, bytes]], *, broken: bool
) -> None:
    """The connection stays pooled, unless a message broke off on it: then it is never used again.

    `before` was the only one in the pool, so it is the one that the row's requests were given.
    """
    if broken:
        await soon(lambda: not before.open)
        for arrivals, data in carried:
            assert arrivals.received.endswith(data), "something came behind the broken message"
    after = await side.probe()
    assert (after is before) is not broken


def body_refused(row: Message) -> bool:
    """Tell whether it is not a head that is refused, but what follows one that was good."""
    of_bodies = ("chunk-", "trailers-", "limit-chunk-", "limit-trailers")
    by_rule = row.rule.startswith(of_bodies) or row.name == "behind-a-refused-body"
    return by_rule and row.told.startswith("400 bad_request")

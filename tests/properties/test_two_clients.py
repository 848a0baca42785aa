"""Clients share connections, and nothing else: no byte of one is ever seen by the other.

Every request carries a tag in its target, its fields, its body and its trailers, and every answer
the tag of the request that it answers, read from that request by the server.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory_mesh import (
    TARGET_LINE,
    FarEnd,
    InboundMesh,
    MemoryMesh,
    OutboundMesh,
    Shown,
)
from tests.properties.reading import Read, RequestReader, read_responses

_TAG = re.compile(rb"tag-[0-9]r[0-9]+;")

SMOOTH = ("exchange", "exchange", "exchange", "exchange", "send", "send", "verify", "answer", "new")
ROUGH = (
    *(
        "cut short",
        "cut short",
        "early",
        "early",
        "early answer",
        "excess",
        "excess",
        "garbage",
        "break",
        "end",
        "refuse",
    ),
    *("leave", "finish", "stall", "flow", "flow", "wait"),
)
KINDS = ("get", "length", "chunked", "expect", "bad body")
EVERYTHING = 1000
"""More bytes than any message here has."""
SHAPES = ("length", "chunked", "none", "interim", "length", "chunked", "closing", "to the end")


def tags(data: bytes) -> list[bytes]:
    return _TAG.findall(data)


def request(tag: bytes, kind: str) -> bytes:
    """A request in which every part names its tag; target and identity stay the same for all."""
    start = b"/%b HTTP/1.1\r\nHost: h\r\n%bX-Tag: %b\r\n" % (tag, TARGET_LINE, tag)
    if kind == "get":
        return b"GET " + start + b"\r\n"
    if kind == "chunked":
        chunk = b"%x\r\n%b\r\n" % (len(tag), tag)
        start += b"Transfer-Encoding: chunked\r\n\r\n" + 3 * chunk
        return b"PUT " + start + b"0\r\nx-tag: %b\r\n\r\n" % tag
    if kind == "bad body":
        return b"PUT " + start + b"Transfer-Encoding: chunked\r\n\r\n3\r\n%b\r\n0\r\n\r\n" % tag
    expect = b"Expect: 100-continue\r\n" if kind == "expect" else b""
    return b"POST %b%bContent-Length: %d\r\n\r\n%b" % (start, expect, 5 * len(tag), 5 * tag)


def answer(tag: bytes, shape: str) -> bytes:
    start = b"200 OK\r\nX-Tag: %b\r\n" % tag
    if shape == "chunked":
        chunk = b"%x\r\n%b\r\n" % (len(tag), tag)
        start += b"Transfer-Encoding: chunked\r\n\r\n"
        return b"HTTP/1.1 " + start + 2 * chunk + b"0\r\nx-tag: %b\r\n\r\n" % tag
    if shape == "none":
        return b"HTTP/1.1 204 No Content\r\nX-Tag: %b\r\n\r\n" % tag
    if shape == "to the end":
        return b"HTTP/1.1 %b\r\n%b" % (start, tag)
    if shape == "interim":
        start = b"103 Early Hints\r\nX-Tag: %b\r\n\r\nHTTP/1.1 %b" % (tag, start)
    if shape == "closing":
        start += b"Connection: close\r\n"
    return b"HTTP/1.1 %bContent-Length: %d\r\n\r\n%b" % (start, 3 * len(tag), 3 * tag)


@dataclass
class Client:
    end: FarEnd
    number: int
    wanted: list[bytes] = field(default_factory=list)
    """Tags of its requests, in order."""
    to_send: bytes = b""

    def send(self, kind: str, size: int) -> None:
        if not self.to_send:
            tag = b"tag-%dr%d;" % (self.number, len(self.wanted))
            self.wanted.append(tag)
            self.to_send = request(tag, kind)
        self.end.sends(self.to_send[:size])
        self.to_send = self.to_send[size:]

    def check(self) -> None:
        """Hold all that it received against what it asked for."""
        received = self.end.received
        mine = b"tag-%dr" % self.number
        assert all(tag.startswith(mine) for tag in tags(received)), received
        in_order = self.end.closed and not self.end.cut
        answers = read_responses(received, [b"GET"] * len(self.wanted), ended=in_order)
        for tag, one in zip(self.wanted, answers, strict=False):
            seen = tags(b"".join(v for _, v in [*one.fields, *one.trailers]) + one.body)
            seen += [t for _, lines in one.interim for _, v in lines for t in tags(v)]
            assert set(seen) <= {tag}
            assert seen or one.error or not one.whole


@dataclass
class Server:
    end: FarEnd
    reader: RequestReader = field(default_factory=RequestReader)
    read: int = 0
    requests: list[Read] = field(default_factory=list)
    to_send: bytes = b""

    def take(self, shape: str) -> list[Read]:
        """Read what is new, and get ready to answer what is whole; give that."""
        new = self.end.received[self.read :]
        self.read += len(new)
        found = self.reader.feed(new)
        for one in found:
            self.to_send += answer(one.all(b"x-tag")[0], shape)
        self.requests += found
        return found

    def current(self) -> bytes:
        """The tag of a request that is still coming, or empty."""
        return self.reader.partial.all(b"x-tag")[0] if self.reader.partial else b""

    def check(self) -> None:
        """Hold each request against its tag: whole, and nothing of another in it."""
        for one in [*self.requests, *([self.reader.partial] if self.reader.partial else [])]:
            (tag,) = one.all(b"x-tag")
            assert one.first[1] == b"/" + tag
            beyond = one.body.replace(tag, b"")
            assert not beyond if one.whole else tag.startswith(beyond)
            assert one.trailers in ([], [(b"x-tag", tag)])
        assert not self.reader.pending


class Play:
    """Two clients and whatever servers the mesh has connected to, moved step by step."""

    def __init__(self, mesh: MemoryMesh) -> None:
        self.mesh = mesh
        second = mesh.accept() if isinstance(mesh, (OutboundMesh, InboundMesh)) else mesh.client
        self.clients = [Client(mesh.client, 0), Client(second, 1)]
        self.servers: list[Server] = []
        self.shape = "length"
        self.asked: set[bytes] = set()
        """Tags of all requests that have come to a server whole."""
        self.answered: set[bytes] = set()
        """Tags of those of which a server has sent some of the answer."""

    def step(self, action: str, who: int, size: int) -> None:
        client = self.clients[who % len(self.clients)]
        open_ones = [one for one in self.servers if not one.end.transport.lost]
        self.shape = SHAPES[size % len(SHAPES)]
        kind = KINDS[(who + size) % len(KINDS)]
        if action == "send":
            client.send(kind, size)
        elif action == "exchange":
            self._exchange(client, "get" if kind == "bad body" else kind, "answer")
        elif action == "excess":
            self._exchange(client, "get", "excess")
        elif action == "cut short":
            self._begin(client, "get", EVERYTHING)
            for server in [one for one in self.servers if one.to_send]:
                self._serve(server, "answer", 1 + size % 10)
                self._serve(server, "break", 0)
        elif action == "early":
            self._begin(client, "length", 160)
            self._serve_all("early answer", size)
        elif action == "leave":
            client.end.breaks()
        elif action == "finish":
            client.end.ends()
        elif action == "stall":
            client.end.stalls()
        elif action == "flow":
            client.end.flows()
        elif action == "wait":
            self.mesh.pass_time(size / 10)
        elif action == "new" and client.end.transport.is_closing() and len(self.clients) < 8:
            assert isinstance(self.mesh, (OutboundMesh, InboundMesh))
            self.clients.append(Client(self.mesh.accept(), len(self.clients)))
        elif isinstance(self.mesh, OutboundMesh) and action in ("verify", "refuse"):
            self.mesh.verify(Shown.TARGET if action == "verify" else Shown.OTHER_APP)
        elif open_ones:
            self._serve(open_ones[who % len(open_ones)], action, size)
        self._take()

    def _take(self) -> None:
        for end in self.mesh.upstreams[len(self.servers) :]:
            self.servers.append(Server(end))
        for server in self.servers:
            for one in server.take(self.shape):
                (tag,) = one.all(b"x-tag")
                # RFC 9110 9.2.2: only what is idempotent, and not once an answer has begun.
                assert tag not in self.answered, "asked again for what was being answered"
                assert tag not in self.asked or one.first[0] == b"GET"
                self.asked.add(tag)

    def _exchange(self, client: Client, kind: str, answered: str) -> None:
        """Have the client's request, begun or new, come to its answer if nothing is in the way."""
        self._begin(client, kind, EVERYTHING)
        self._serve_all(answered, EVERYTHING)

    def _begin(self, client: Client, kind: str, size: int) -> None:
        client.send(kind, size)
        if isinstance(self.mesh, OutboundMesh):
            self.mesh.verify()
        self._take()

    def _serve_all(self, action: str, size: int) -> None:
        for server in self.servers:
            self._serve(server, action, size)

    def _serve(self, server: Server, action: str, size: int) -> None:
        if server.to_send and action in ("answer", "excess"):
            self.answered.update(tags(server.to_send))
        if action == "answer":
            server.end.sends(server.to_send[:size])
            server.to_send = server.to_send[size:]
        elif action == "early answer":
            tag = server.current()
            if tag and not server.to_send:
                server.end.sends(answer(tag, "length"))
        elif action == "garbage":
            server.to_send = server.to_send[: size // 2] + b"\0\r\n\r\n"
        elif action == "excess" and server.to_send:  # in one read with an answer's end
            server.end.sends(2 * server.to_send)
            server.to_send = b""
        elif action == "break":
            server.end.breaks()
        elif action == "end":
            server.end.ends()

    def check(self) -> None:
        for client in self.clients:
            client.check()
        for server in self.servers:
            server.check()


SIZES = st.sampled_from([1, 2, 5, 10, 20, 40, 80, 160, 320, *range(1000, 1008)])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(SMOOTH) | st.sampled_from(SMOOTH) | st.sampled_from(SMOOTH + ROUGH),
        st.integers(0, 3),
        SIZES,
    ),
    min_size=15,
    max_size=50,
)


@pytest.mark.parametrize("make", [OutboundMesh, InboundMesh])
@settings(max_examples=3 * settings().max_examples)
@given(STEPS)
def test_nothing_of_one_client_is_ever_seen_by_another(
    make: Callable[[], MemoryMesh], steps: list[tuple[str, int, int]]
) -> None:
    with make() as mesh:
        play = Play(mesh)
        for step in steps:
            play.step(*step)
        play.check()


@pytest.mark.parametrize("make", [OutboundMesh, InboundMesh])
def test_they_do_share_connections(make: Callable[[], MemoryMesh]) -> None:
    """Without this the property above would say nothing."""
    with make() as mesh:
        play = Play(mesh)
        for who in (0, 1, 0, 1):
            play.step("exchange", who, EVERYTHING)
        play.check()
        (server,) = play.servers
        asked = [one.first[1] for one in server.requests]
        assert asked == [b"/tag-0r0;", b"/tag-1r0;", b"/tag-0r1;", b"/tag-1r1;"]
        for client in play.clients:
            assert client.end.received.count(b"200 OK") == 2

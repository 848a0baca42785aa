"""The other ends, played by h11: an independent strict reader of all that the mesh sends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import h11
from tests.memory_mesh import FarEnd, MemoryMesh, OutboundMesh

Field = tuple[bytes, bytes]

_MOST = 200_000


@dataclass
class Read:
    """A message as h11 understood it. `whole` is False where the bytes ended before it did."""

    first: tuple[bytes | int, bytes]
    """Method and target, or status and reason."""
    fields: list[Field]
    body: bytes = b""
    trailers: list[Field] = field(default_factory=list)
    whole: bool = False
    interim: list[tuple[int, list[Field]]] = field(default_factory=list)

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key.lower() == name]

    @property
    def error(self) -> str:
        """The mesh's own error code, or empty."""
        return b"".join(self.all(b"x-dstack-mesh-error")).decode()


def _raw(
    of: h11.Request | h11.Response | h11.EndOfMessage | h11.InformationalResponse,
) -> list[Field]:
    return [(bytes(name), bytes(value)) for name, value in of.headers.raw_items()]


class RequestReader:
    """Reads requests from a connection. Raises `h11.RemoteProtocolError` for what is none."""

    def __init__(self) -> None:
        self.partial: Read | None = None
        """A request of which the end has not come."""
        self.switched = b""
        """What came behind a request whose connection was given over to another protocol."""
        self.tunnel = False
        self._begin(b"")

    def _begin(self, data: bytes) -> None:
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST)
        if data:
            self._parser.receive_data(data)

    @property
    def pending(self) -> bytes:
        """Bytes of a head that is not complete."""
        return b"" if self.partial else self._parser.trailing_data[0]

    def feed(self, data: bytes) -> list[Read]:
        """Give the requests that are complete now."""
        if self.tunnel:
            self.switched += data
            return []
        if data:
            self._parser.receive_data(data)
        complete = []
        while True:
            event = self._parser.next_event()
            if isinstance(event, h11.Request):
                self.partial = Read((event.method, event.target), _raw(event))
            elif isinstance(event, h11.Data):
                assert self.partial is not None
                self.partial.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert self.partial is not None
                self.partial.trailers = _raw(event)
                self.partial.whole = True
                complete.append(self.partial)
                self.partial = None
                self._begin(self._parser.trailing_data[0])
            else:
                return complete

    def switch(self) -> None:
        """Take all that comes from now on for another protocol's."""
        self.tunnel = True
        self.switched += self._parser.trailing_data[0]
        self._begin(b"")


def read_requests(data: bytes) -> list[Read]:
    """Read all requests of a connection; the last may lack its end."""
    reader = RequestReader()
    complete = reader.feed(data)
    assert not reader.pending, reader.pending
    return [*complete, reader.partial] if reader.partial else complete


def read_responses(data: bytes, methods: list[bytes], *, ended: bool = False) -> list[Read]:
    """Read the responses to requests of `methods`; one that lacks its end is the last.

    `ended` tells that the connection was ended in order. Bytes behind the last one are an error.
    """
    found: list[Read] = []
    for method in methods:
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        if not data:
            break
        parser.receive_data(data)
        if ended:
            parser.receive_data(b"")
        read = _read_response(parser)
        found.append(read)
        data = parser.trailing_data[0]
        if not read.whole:
            break
    else:
        assert not data, f"{data!r} answers no request"
    return found


def _read_response(parser: h11.Connection) -> Read:
    read = Read((0, b""), [])
    while True:
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError as error:
            if str(error).startswith("peer "):
                return read  # not malformed: the connection ended too early
            raise
        if isinstance(event, h11.InformationalResponse):
            read.interim.append((event.status_code, _raw(event)))
        elif isinstance(event, h11.Response):
            read.first = (event.status_code, event.reason)
            read.fields = _raw(event)
        elif isinstance(event, h11.Data):
            read.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            read.trailers = _raw(event)
            read.whole = True
            return read
        else:
            return read


Answering = Callable[[Read], bytes]


def echo(request: Read) -> bytes:
    """Answer with what was asked."""
    method, target = request.first
    body = b"" if method == b"HEAD" else b"%b %b" % (target, request.body)
    size = len(target) + 1 + len(request.body)
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size, body)


class Servers:
    """All servers of a mesh: they read what they are sent, and answer each request once whole."""

    def __init__(self, mesh: MemoryMesh, answer: Answering = echo) -> None:
        self.mesh = mesh
        self.requests: list[Read] = []
        """Whole requests, in the order in which they became so."""
        self.readers: list[RequestReader] = []
        self._seen: list[int] = []
        self._answer = answer

    @property
    def partial(self) -> list[Read]:
        """Requests of which the end never came."""
        return [reader.partial for reader in self.readers if reader.partial]

    def settle(self) -> None:
        """Verify, read and answer until there is nothing more to do."""
        while self._step():
            pass
        for reader in self.readers:
            assert not reader.pending, f"half a head was sent: {reader.pending!r}"

    def _step(self) -> bool:
        mesh = self.mesh
        if isinstance(mesh, OutboundMesh) and mesh.handshaking:
            mesh.verify()
            return True
        moved = False
        for number, server in enumerate(mesh.upstreams):
            if number == len(self.readers):
                self.readers.append(RequestReader())
                self._seen.append(0)
            moved |= self._serve(number, server)
        return moved

    def _serve(self, number: int, server: FarEnd) -> bool:
        received = server.received
        new = received[self._seen[number] :]
        self._seen[number] = len(received)
        for request in self.readers[number].feed(new):
            self.requests.append(request)
            answer = self._answer(request)
            if answer.startswith(b"HTTP/1.1 101"):
                self.readers[number].switch()
            server.sends(answer)
        return bool(new)


def without_details(read: Read) -> object:
    """Give what an answer says; of one of the mesh's own, that it is, and which."""
    if read.error and b"; remote" not in read.all(b"x-dstack-mesh-error")[0]:
        return (read.first[0], read.error)
    return (read.first, read.fields, read.body, read.trailers, read.whole, read.interim)

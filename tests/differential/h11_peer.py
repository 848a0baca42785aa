"""A server that understands requests by h11 alone, echoes each, and keeps what it saw."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import h11

from dstack_mesh.model import TcpAddress
from tests.differential.account import Book, Seen
from tests.integration.harness import Wire, origin

PORT_HEADER = b"x-seen-port"
"""A proxy in front puts its own client's port there."""


class H11Server:
    """See the module. What it saw is kept by the port that the connection came from."""

    name = "h11"

    def __init__(self) -> None:
        self._seen = Book()
        self.address: TcpAddress

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[H11Server]:
        """Serve for the block."""
        async with origin(self._serve) as (_, self.address):
            yield self

    def seen(self, port: int) -> list[Seen]:
        """See `Peer`."""
        return self._seen.seen(port)

    def counts(self) -> dict[int, int]:
        """See `Peer`."""
        return self._seen.counts()

    async def _serve(self, wire: Wire) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=256 * 1024)
        port = wire._writer.get_extra_info("peername")[1]
        while await self._request(wire, connection, port):
            connection.start_next_cycle()

    async def _request(self, wire: Wire, connection: h11.Connection, port: int) -> bool:
        """Read and answer one request; tell whether another may follow."""
        head: h11.Request | None = None
        body = b""
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.receive_data(await wire.read())
                elif isinstance(event, h11.Request):
                    head = event
                    port = int(dict(head.headers).get(PORT_HEADER, port))
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.ConnectionClosed), event
                    return False
        except h11.RemoteProtocolError:
            self._note(port, head, 0 if wire.ended else 400, complete=False, body=body)
            if not wire.ended:
                await wire.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            return False
        assert head is not None
        self._note(port, head, 200, complete=True, body=body)
        await wire.send(_echo(connection, head))
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    def _note(
        self, port: int, head: h11.Request | None, status: int, *, complete: bool, body: bytes
    ) -> None:
        method = head.method.decode("ascii") if head else ""
        target = head.target.decode("latin-1") if head else ""
        self._seen.add(port, Seen(method, target, status, complete, body=body))


def _echo(connection: h11.Connection, head: h11.Request) -> bytes:
    text = b"%b %b\n" % (head.method, head.target)
    fields = [(b"content-length", b"%d" % len(text)), (b"content-type", b"text/plain")]
    out = connection.send(h11.Response(status_code=200, headers=fields)) or b""
    if head.method != b"HEAD":
        out += connection.send(h11.Data(data=text)) or b""
    return out + (connection.send(h11.EndOfMessage()) or b"")

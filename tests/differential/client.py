"""A client of bare bytes that reads responses with h11, large ones too, and never past its own."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import h11

from dstack_mesh.model import TcpAddress

_SECONDS = 20.0
_LARGEST_HEAD = 256 * 1024


@dataclass(frozen=True)
class Answer:
    """One whole response."""

    status: int
    fields: dict[bytes, bytes]
    body: bytes


class BrokenOffError(Exception):
    """There was no whole response."""


def _reader(method: str, received: bytes) -> h11.Connection:
    reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LARGEST_HEAD)
    reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    reader.send(h11.EndOfMessage())
    if received:
        reader.receive_data(received)
    return reader


class Caller:
    """Calls one address, on one connection as long as that is open."""

    def __init__(self, address: TcpAddress) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._ahead = b""
        """What came behind the last response: the next one reads it, whosever it is."""

    @property
    def connected(self) -> bool:
        """Whether the connection is still there for another request."""
        return self._streams is not None

    async def send(self, data: bytes) -> None:
        """Send a request, on a new connection where the last one is over."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._address.host, self._address.port)
        with contextlib.suppress(ConnectionError):
            self._streams[1].write(data)
            await self._streams[1].drain()

    async def answer(self, method: str) -> Answer:
        """Read the one response to what was sent. Raises `BrokenOffError`."""
        assert self._streams is not None, "nothing was sent"
        reader = _reader(method, self._ahead)
        try:
            async with asyncio.timeout(_SECONDS):
                answer = await self._read(reader, self._streams[0])
        except (h11.RemoteProtocolError, ConnectionError) as error:
            await self.hang_up()
            raise BrokenOffError(str(error)) from error
        if reader.their_state is h11.DONE:
            self._ahead = reader.trailing_data[0]
        else:
            await self.hang_up()
        return answer

    async def _read(self, reader: h11.Connection, stream: asyncio.StreamReader) -> Answer:
        head: h11.Response | None = None
        body = b""
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                reader.receive_data(await stream.read(65536))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
        assert head is not None
        return Answer(head.status_code, dict(head.headers), body)

    async def hang_up(self) -> None:
        """End the connection, if there is one."""
        self._ahead = b""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def read_answer(data: bytes, method: str) -> Answer | None:
    """Give the response that `data` is, if it is one whole one and nothing else."""
    reader = _reader(method, data)
    head: h11.Response | None = None
    body = b""
    try:
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                return None
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
    except h11.RemoteProtocolError:
        return None
    assert head is not None
    assert not reader.trailing_data[0], reader.trailing_data
    return Answer(head.status_code, dict(head.headers), body)

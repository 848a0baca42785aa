"""The client of the demo: what an application would send to its sidecar, with any HTTP library."""

from __future__ import annotations

import asyncio
import contextlib
import json
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import h11

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Mapping

_T = TypeVar("_T")

TIMEOUT_SECONDS = 20.0
"""To connect, and for each piece of an answer."""

_READ_SIZE = 64 * 1024


class ClientError(OSError):
    """No whole answer came; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response."""

    status: int
    error: str
    """The mesh's own error code (`x-dstack-mesh-error`), or empty."""

    body: bytes

    def json(self) -> Any:
        """Decode the body. Raises `ValueError`."""
        return json.loads(self.body)

    def field(self, name: str) -> str:
        """Give the text at `name` of a JSON body; empty where there is none."""
        try:
            found = self.json()
        except ValueError:
            return ""
        return str(found.get(name, "")) if isinstance(found, dict) else ""

    def __str__(self) -> str:
        return f"{self.status} {self.error}".rstrip()


async def get(
    address: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Send a GET to `address` (host:port) on a connection of its own. Raises `OSError`."""
    return await _whole(_exchange(address, _request("GET", path, headers), (), tls))


async def post(
    address: str, path: str, headers: Mapping[str, str], body: Iterable[bytes], size: int
) -> Answer:
    """Send a POST with the `size` bytes of `body`, never faster than taken. Raises `OSError`."""
    fields = {**headers, "content-length": str(size)}
    return await _whole(_exchange(address, _request("POST", path, fields), body, None))


async def lines(address: str, path: str, headers: Mapping[str, str]) -> AsyncIterator[str]:
    """Give the lines of the answer to a GET as they arrive; its status has to be 200.

    Raises `OSError`.
    """
    pending = b""
    async with aclosing(_exchange(address, _request("GET", path, headers), (), None)) as events:
        async for event in events:
            if isinstance(event, h11.Response) and event.status_code != 200:
                raise ClientError(f"the answer was {event.status_code}")
            if isinstance(event, h11.Data):
                *whole, pending = (pending + bytes(event.data)).split(b"\n")
                for line in whole:
                    yield line.decode()


async def _whole(events: AsyncIterator[h11.Event]) -> Answer:
    status, error, body = 0, "", bytearray()
    async for event in events:
        if isinstance(event, h11.Response):
            status = event.status_code
            error = dict(event.headers).get(b"x-dstack-mesh-error", b"").decode("latin-1")
        elif isinstance(event, h11.Data):
            body += event.data
    return Answer(status, error, bytes(body))


def _request(method: str, path: str, headers: Mapping[str, str] | None) -> h11.Request:
    fields = {"host": "demo.test", "connection": "close", **(headers or {})}
    return h11.Request(method=method, target=path, headers=list(fields.items()))


async def _exchange(
    address: str, request: h11.Request, body: Iterable[bytes], tls: ssl.SSLContext | None
) -> AsyncGenerator[h11.Event, None]:
    """Give what h11 makes of the answer, as it comes. Raises `OSError`."""
    host, _, port = address.rpartition(":")
    http = h11.Connection(h11.CLIENT)
    reader, writer = await _in_time(asyncio.open_connection(host, int(port), ssl=tls))
    sending = asyncio.create_task(_send(http, writer, request, body))
    try:
        async for event in _receive(http, reader):
            yield event
    except h11.RemoteProtocolError as error:
        raise ClientError(f"no whole answer: {error}") from error
    finally:
        # An answer that came before the request's end leaves the rest unsent.
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _send(
    http: h11.Connection,
    writer: asyncio.StreamWriter,
    request: h11.Request,
    body: Iterable[bytes],
) -> None:
    """Send it all; where the connection ends before, it is the receiving side that tells."""
    with contextlib.suppress(ConnectionError, h11.LocalProtocolError):
        writer.write(http.send(request) or b"")
        for piece in body:
            writer.write(http.send(h11.Data(data=piece)) or b"")
            await writer.drain()
        writer.write(http.send(h11.EndOfMessage()) or b"")
        await writer.drain()


async def _receive(http: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[h11.Event]:
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await _in_time(reader.read(_READ_SIZE)))
        elif isinstance(event, h11.Event):
            yield event
            if isinstance(event, h11.EndOfMessage):
                return
        else:
            raise ClientError("the connection ended before an answer")


async def _in_time(step: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await step
    except TimeoutError:
        raise ClientError(f"nothing for {TIMEOUT_SECONDS:g} s") from None

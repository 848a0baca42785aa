"""What the simulator's HTTP server hands to a handler, and what a handler may answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import asyncio

READ_SIZE = 256 * 1024

HeaderPairs = list[tuple[str, str]]


@dataclass(slots=True)
class Request:
    """A request's head as it came, and its body to be read by the handler."""

    method: str
    target: str
    headers: HeaderPairs
    """In order, repeated ones too, names spelled as they came; bytes are read as Latin-1."""

    http_version: str
    body: AsyncIterator[bytes] = field(repr=False)
    trailers: HeaderPairs
    """Filled once the body has been read."""

    @property
    def path(self) -> str:
        """The target's path, percent-encoding left alone."""
        return urlsplit(self.target).path if "://" in self.target else self.target.split("?")[0]

    @property
    def query(self) -> str:
        """What follows the first `?`, or nothing."""
        return self.target.partition("?")[2]

    def header(self, name: str) -> str | None:
        """The first header of this name (any case), or None."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    async def read(self) -> bytes:
        """Read the whole body."""
        return b"".join([chunk async for chunk in self.body])


@dataclass(slots=True)
class Response:
    """An answer. A body of bytes gets its length; an iterator is sent chunked, if no length is."""

    status: int = 200
    headers: HeaderPairs = field(default_factory=list)
    body: bytes | AsyncIterator[bytes] = b""
    trailers: HeaderPairs = field(default_factory=list)
    """Only sent with a chunked body."""

    interim: list[tuple[int, HeaderPairs]] = field(default_factory=list)
    """1xx responses to be sent before."""


@dataclass(slots=True)
class Raw:
    """Bytes sent as they are, valid or not, and then the end of the connection."""

    data: bytes = b""


@dataclass(slots=True)
class Duplex:
    """What is left of a connection after `101 Switching Protocols`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    early: bytes = b""
    """Bytes that the client sent on the heels of its request."""

    async def read(self) -> bytes:
        """Read some bytes; none means the end."""
        if self.early:
            early, self.early = self.early, b""
            return early
        return await self.reader.read(READ_SIZE)

    async def write(self, data: bytes) -> None:
        """Write, and wait while the other side does not read."""
        self.writer.write(data)
        await self.writer.drain()


@dataclass(slots=True)
class Upgrade:
    """`101 Switching Protocols`, then `run` has the connection until it returns."""

    headers: HeaderPairs
    """`upgrade` among them."""

    run: Callable[[Duplex], Awaitable[None]]


Answer = Response | Raw | Upgrade
Handler = Callable[[Request], Awaitable[Answer]]

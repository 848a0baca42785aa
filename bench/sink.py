"""An origin for uploads: reads a body to its end before it answers, and says how long it was.

nginx answers `return 200` before it has read the body, so an upload to it would measure nothing.
Runs as a process: `python -m bench.sink PORT`.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_READ_SIZE = 1 << 18


class Sink(asyncio.BufferedProtocol):
    """One connection: heads with a length or chunked bodies, answered in turn."""

    def __init__(self) -> None:
        self._buffer = bytearray(_READ_SIZE)
        self._view = memoryview(self._buffer)
        self._head = b""
        self._left = 0
        self._size = 0
        self._chunked = False
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, count: int) -> None:
        if self._chunked:
            self._take_chunked(bytes(self._view[:count]))
        elif self._left:
            self._take(count)
        else:
            self._head += self._view[:count]
            self._begin()

    def _begin(self) -> None:
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if not end:
            return
        self._head = b""
        length = _LENGTH.search(head + b"\r\n")
        if length is not None:
            self._size = self._left = int(length[1])
            self._take(len(rest))
        else:
            self._chunked, self._size, self._tail = True, 0, b""
            self._take_chunked(rest)

    def _take(self, count: int) -> None:
        self._left -= count
        if not self._left:
            self._answer()

    def _take_chunked(self, piece: bytes) -> None:
        """Only the end is looked for: the bodies sent here are zeros and contain none."""
        self._size += len(piece)
        self._tail = (self._tail + piece)[-7:]
        if self._tail.endswith(b"0\r\n\r\n"):
            self._chunked = False
            self._answer()

    def _answer(self) -> None:
        assert self._transport is not None
        text = str(self._size).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
        )


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))

"""One connection of the load over mutual TLS: asks and counts answers as cheaply as can be."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Sequence
from typing import cast

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class AnswerError(Exception):
    """An answer was not 200, or none came: the run measured something else."""


class Connection(asyncio.Protocol):
    """Reads answers with a `Content-Length`. What fails shows where the caller waits next."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._left = 0
        self._requests: Sequence[bytes] = ()
        self._next = 0
        self._count = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclasses

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        self._fail(AnswerError(f"the connection was closed: {error}"))

    def data_received(self, data: bytes) -> None:
        if self._left:
            self._left -= len(data)
        else:
            if self._head:
                data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            self._head = b""
            length = _LENGTH.search(data, 0, end)
            if not data.startswith(b"HTTP/1.1 200 ") or length is None:
                self._fail(AnswerError(f"not an answer to count: {data[:200]!r}"))
                return
            self._left = int(length[1]) - (len(data) - end - 4)
        if not self._left:
            self._answered()

    def _answered(self) -> None:
        self._count += 1
        if self._requests:
            self._send_next()
        elif self._waiter is not None:
            self._waiter.set_result(None)
            self._waiter = None

    def _send_next(self) -> None:
        self._next = (self._next + 1) % len(self._requests)
        self._write(self._requests[self._next])

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._requests = ()
        if self._waiter is not None:
            self._waiter.set_exception(self._error)
            self._waiter = None

    def repeat(self, requests: Sequence[bytes], first: int) -> None:
        """Ask these in turn, each as soon as the one before is answered, until `stop`."""
        self._requests, self._next, self._count = requests, first, 0
        self._write(requests[first])

    async def stop(self) -> int:
        """Wait for the last answer; give how many there were. Raises `AnswerError`."""
        self._requests = ()
        await self._wait()
        return self._count

    async def exchange(self, request: bytes) -> None:
        """Ask once and wait for the answer's end. Raises `AnswerError`."""
        self._requests = ()
        self._write(request)
        await self._wait()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(30):
            await self._waiter

    def session(self) -> tuple[ssl.SSLSession | None, bool]:
        """Give the session to resume later, and whether this connection resumed one."""
        assert self._transport is not None
        tls = self._transport.get_extra_info("ssl_object")
        return tls.session, bool(tls.session_reused)

    async def close(self) -> None:
        """Close, and wait for it, so that the peer's work for it is over too."""
        assert self._transport is not None
        self._transport.close()
        async with asyncio.timeout(30):
            await self._closed

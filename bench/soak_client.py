"""The load of a soak: requests at a fixed rate, and two exchanges that last as long as the run."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

BODY = os.urandom(20_000)
_DIGEST = hashlib.sha256(BODY).hexdigest().encode()
_EVENTS = 10**9
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close\r\n", re.IGNORECASE)
_REASONS = 20


class WrongAnswerError(ValueError):
    """What came is not what was asked for."""


# Whatever can't be read as what was asked for is a ValueError.
_FAILURES = (OSError, EOFError, ValueError)


@dataclass
class Counts:
    """What the load saw."""

    requests: int = 0
    failures: int = 0
    """Requests, or exchanges on the two long ones, with no right answer in time."""

    drops: int = 0
    """Connections that ended without an announcement, or in the middle of something."""

    closed: int = 0
    """Connections that ended as an answer's `connection: close` had said: no loss."""

    echoes: int = 0
    events: int = 0
    slowest_ms: float = 0.0
    reasons: list[str] = field(default_factory=list)
    """The first failures."""

    def fail(self, what: str, error: Exception) -> None:
        """Count one failure, and a drop where the connection's end was its cause."""
        self.failures += 1
        self.drops += isinstance(error, (EOFError, ConnectionError))
        if len(self.reasons) < _REASONS:
            self.reasons.append(f"{time.strftime('%H:%M:%S')} {what}: {error!r:.300}")


class Load:
    """Asks the target app `app_id` by way of the outbound listener `address`."""

    def __init__(self, address: str, app_id: str, *, rate: float = 200, patience: float = 10):
        host, _, port = address.rpartition(":")
        self._where = (host, int(port))
        self._target = f"Host: soak.test\r\nx-dstack-target-app: {app_id}\r\n"
        self._rate = rate
        self._patience = patience
        self.counts = Counts()

    async def run(self, seconds: float, connections: int = 8) -> Counts:
        """Load for so many seconds, every fourth request a POST; give what was seen."""
        begin = time.monotonic()
        until = begin + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(connections):
                turns = itertools.count(number, connections)
                group.create_task(self._kept(turns, begin, until))
            group.create_task(self._lasting("the tunnel", self._tunnel, until))
            group.create_task(self._lasting("the event stream", self._stream, until))
        return self.counts

    async def _kept(self, turns: itertools.count[int], begin: float, until: float) -> None:
        """Ask over one connection, each turn when it is due, however late the last answer was."""
        async with contextlib.AsyncExitStack() as stack:
            connection = None
            while (due := begin + next(turns) / self._rate) < until and time.monotonic() < until:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.counts.requests += 1
                method = "GET" if self.counts.requests % 4 else "POST"
                sent = time.monotonic()
                try:
                    async with asyncio.timeout(self._patience):
                        if connection is None:
                            connection = await stack.enter_async_context(self._open())
                        closes = await self._exchange(method, *connection)
                except _FAILURES as error:
                    self.counts.fail(method, error)
                    closes = True
                else:
                    self.counts.closed += closes
                took = (time.monotonic() - sent) * 1e3
                self.counts.slowest_ms = max(self.counts.slowest_ms, took)
                if closes:
                    connection = None
                    await stack.aclose()

    async def _exchange(
        self, method: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Ask once, hold the answer against what it must be; give whether it says `close`."""
        if method == "GET":
            writer.write(self._request("GET /", ""))
        else:
            writer.write(self._request("POST /upload", f"Content-Length: {len(BODY)}\r\n") + BODY)
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None:
            raise WrongAnswerError(head)
        body = await reader.readexactly(int(length[1]))
        if not head.startswith(b"HTTP/1.1 200 "):
            raise WrongAnswerError(head + body)
        expected = b"hello\n" if method == "GET" else b'"sha256": "%b"' % _DIGEST
        if expected not in body:
            raise WrongAnswerError(body)
        return _CLOSES.search(head) is not None

    async def _lasting(
        self, what: str, one: Callable[[float], Awaitable[None]], until: float
    ) -> None:
        """Keep one long exchange up; whatever ends it before the time is a failure."""
        while time.monotonic() < until:
            try:
                await one(until)
            except _FAILURES as error:
                self.counts.fail(what, error)
                await asyncio.sleep(0.5)

    async def _tunnel(self, until: float) -> None:
        async with self._open() as (reader, writer):
            writer.write(self._request("GET /ws", "connection: upgrade\r\nupgrade: echo\r\n"))
            async with asyncio.timeout(self._patience):
                head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101 "):
                raise WrongAnswerError(head)
            while time.monotonic() < until:
                said = f"{time.monotonic()}\n".encode()
                writer.write(said)
                async with asyncio.timeout(self._patience):
                    heard = await reader.readexactly(len(said))
                if heard != said:
                    raise WrongAnswerError(heard)
                self.counts.echoes += 1
                await asyncio.sleep(0.5)

    async def _stream(self, until: float) -> None:
        async with self._open() as (reader, writer):
            writer.write(self._request(f"GET /events?n={_EVENTS}&seconds=0.5", ""))
            async with asyncio.timeout(self._patience):
                head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise WrongAnswerError(head)
            buffer, number = b"", 1
            while time.monotonic() < until:
                async with asyncio.timeout(self._patience):
                    buffer += await _chunk(reader)
                event = f"id: {number}\ndata: event {number} of {_EVENTS}\n\n".encode()
                if buffer.startswith(event):
                    buffer, number = buffer[len(event) :], number + 1
                    self.counts.events += 1
                elif not event.startswith(buffer):
                    raise WrongAnswerError(buffer)

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        try:
            reader, writer = await asyncio.open_connection(*self._where)
        except ConnectionError as error:  # nothing was dropped: there was no connection
            raise OSError(f"no connection: {error}") from None
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _request(self, line: str, fields: str) -> bytes:
        return f"{line} HTTP/1.1\r\n{self._target}{fields}\r\n".encode()


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readuntil(b"\r\n")).strip() or b"0", 16)
    data = (await reader.readexactly(size + 2))[:-2]
    if not data:
        raise EOFError("the stream was ended by the other side")
    return data

"""A relay that breaks connections the way networks and programs do, at a chosen byte.

It stands between two parts, TCP or unix socket on either side, knows nothing of what it carries,
and lets all through that no fault says otherwise of.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dstack_mesh.model import Address, TcpAddress, UnixAddress

_PIECE = 65536

Kind = Literal["delay", "drip", "reset", "half-close", "blackhole", "garbage", "truncate"]
Way = Literal["up", "down"]
"""`up` is from who connected to whom is connected to."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of a connection once `at` bytes have gone `way`.

    | kind | what happens then |
    |---|---|
    | `delay` | the rest waits for `seconds` |
    | `drip` | the rest goes byte by byte, `seconds` apart |
    | `reset` | both sides see a reset |
    | `half-close` | the receiver sees an orderly end; the other way goes on |
    | `blackhole` | the rest goes nowhere, nothing ends |
    | `garbage` | `content` goes, then the rest |
    | `truncate` | both sides see an orderly end |

    At 0 it happens as soon as the connection is there, before a byte has come.
    """

    kind: Kind
    way: Way = "down"
    at: int = 0
    seconds: float = 0.0
    content: bytes = b"\x00garbage\xff\r\n\r\n"


class FaultProxy:
    """Listens, and connects each connection on to `target`."""

    fault: Fault | None = None
    """For the connections to come."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.connections = 0
        """Accepted so far."""

        self._next: list[Fault] = []
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, address: Address | None = None) -> Address:
        """Listen on `address` (a free port of 127.0.0.1 if none is given); give the one bound."""
        if isinstance(address, UnixAddress):
            self._server = await asyncio.start_unix_server(self._accept, address.path)
            return address
        host, port = ("127.0.0.1", 0) if address is None else (address.host, address.port)
        self._server = await asyncio.start_server(self._accept, host, port)
        return TcpAddress(*self._server.sockets[0].getsockname()[:2])

    async def aclose(self) -> None:
        """Stop listening and cut what is open."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def fault_next(self, *faults: Fault) -> None:
        """Give one fault each to the next connections; those after them have `fault`."""
        self._next.extend(faults)

    def strike(self, fault: Fault) -> None:
        """Break the connections that are open now; bytes count from now."""
        for connection in self._open:
            connection.strike(fault)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        fault = self._next.pop(0) if self._next else self.fault
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a callback of asyncio's is one
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await self._carry((reader, writer), fault)
        except (OSError, asyncio.CancelledError):
            return  # no target; or `aclose`, of which asyncio would make a failure
        finally:
            writer.transport.abort()

    async def _carry(self, client: _Stream, fault: Fault | None) -> None:
        connection = _Connection(client, await _connect(self.target), fault)
        self._open.add(connection)
        try:
            await connection.run()
        finally:
            self._open.discard(connection)


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(target: Address) -> _Stream:
    if isinstance(target, UnixAddress):
        return await asyncio.open_unix_connection(target.path)
    return await asyncio.open_connection(target.host, target.port)


class _Connection:
    """One connection and its continuation."""

    def __init__(self, client: _Stream, target: _Stream, fault: Fault | None) -> None:
        self._client, self._target = client, target
        self._up = _Pump(client[0], target[1])
        self._down = _Pump(target[0], client[1])
        if fault is not None:
            self.strike(fault)

    def strike(self, fault: Fault) -> None:
        (self._up if fault.way == "up" else self._down).strike(fault)

    async def run(self) -> None:
        """Carry both ways until both have ended, or a fault ends both."""
        pumps = [asyncio.ensure_future(one.run()) for one in (self._up, self._down)]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            failure = next((one.exception() for one in done if one.exception()), None)
            if isinstance(failure, _ResetError):
                for _, writer in (self._client, self._target):
                    _reset(writer)
            elif isinstance(failure, _TruncateError):
                await _stop(pumps)
                await asyncio.gather(*(_end(*one) for one in (self._client, self._target)))
            elif failure is not None and not isinstance(failure, OSError):
                raise failure
        finally:
            for _, writer in (self._client, self._target):  # first: nothing here can interrupt it
                writer.transport.abort()
            await _stop(pumps)


class _ResetError(Exception):
    """Both sides are to see a reset."""


class _TruncateError(Exception):
    """Both sides are to see an orderly end."""


class _Pump:
    """Carries one way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._fault: Fault | None = None
        self._left = 0
        self._ahead = b""
        """Read, but behind the byte at which the fault is to happen."""
        self._struck = asyncio.Event()

    def strike(self, fault: Fault) -> None:
        self._fault, self._left = fault, fault.at
        self._struck.set()

    async def run(self) -> None:
        while True:
            if self._fault is not None and self._left == 0:
                fault, self._fault = self._fault, None
                await self._break(fault)
            most = _PIECE if self._fault is None else min(_PIECE, self._left)
            data = await self._read(most)
            if data is None:
                continue
            if not data:
                self._end()
                return
            if self._fault is not None:  # it may have come while this was being read
                data, self._ahead = data[: self._left], data[self._left :] + self._ahead
                self._left -= len(data)
            await self._write(data)

    async def _read(self, most: int) -> bytes | None:
        """Give what comes next, empty at the end; None where a fault came meanwhile."""
        if data := self._from_ahead(most):
            return data
        self._struck.clear()
        read = asyncio.ensure_future(self._reader.read(most))
        struck = asyncio.ensure_future(self._struck.wait())
        try:
            await asyncio.wait((read, struck), return_when=asyncio.FIRST_COMPLETED)
            return read.result() if read.done() else None
        finally:
            await _stop([read, struck])

    def _from_ahead(self, most: int) -> bytes:
        data, self._ahead = self._ahead[:most], self._ahead[most:]
        return data

    async def _break(self, fault: Fault) -> None:
        if fault.kind == "reset":
            raise _ResetError
        if fault.kind == "truncate":
            raise _TruncateError
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        elif fault.kind == "garbage":
            await self._write(fault.content)
        elif fault.kind == "drip":
            while byte := self._from_ahead(1) or await self._reader.read(1):
                await asyncio.sleep(fault.seconds)
                await self._write(byte)
        elif fault.kind == "half-close":
            self._end()
            await _discard(self._reader)
        else:
            await _discard(self._reader)
            await asyncio.Event().wait()  # an end goes nowhere either

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def _end(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write_eof()


async def _discard(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(_PIECE):
            pass


async def _end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """End in order, and read on to the other's end: closing with bytes unread is a reset."""
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()
    await _discard(reader)


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock.family != socket.AF_UNIX:  # which knows no reset, only an end
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _stop(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

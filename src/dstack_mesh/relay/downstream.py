"""A client's connection: finds heads in its bytes and runs one exchange after the other."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import socket
import struct
from typing import Any, Final, Generic

from dstack_mesh.errors import BadRequest, HeaderTooLarge, MeshError, Overloaded, UriTooLong
from dstack_mesh.memory import let_go
from dstack_mesh.relay.answers import Answer, find_request_id, problem
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.interfaces import Client, Decision, Handler, Listener, P
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.seen import Seen
from dstack_mesh.wire.fields import has_bare_lf, is_token
from dstack_mesh.wire.limits import (
    MAX_HEAD_BYTES,
    MAX_REQUEST_LINE_BYTES,
    MAX_REQUEST_TARGET_BYTES,
)
from dstack_mesh.wire.request import RequestLine, check_body, parse_request_line

_WRITE_HIGH_WATER: Final = 128 * 1024
_after_empty_lines = re.compile(rb"\A(?:\r\n)+").sub
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_MAX_REPEATED_BYTES: Final = 2048
"""What a connection may hold in memory of its last head."""


class Downstream(Client, Generic[P]):
    """The server's end of one HTTP/1.1 connection."""

    __slots__ = (
        "_exchange",
        "_handler",
        "_head_started",
        "_last",
        "_lingering",
        "_listener",
        "_paused",
        "_pending",
        "_saw_eof",
        "_tunnel",
        "transport",
    )

    def __init__(self, listener: Listener, handler: Handler[P]) -> None:
        super().__init__(listener.worker)
        self.transport: Any = None
        self._listener = listener
        self._handler = handler
        self._exchange: Exchange | None = None
        self._pending = b""
        self._head_started = False
        self._paused = False
        self._lingering = False
        self._tunnel = False
        self._saw_eof = False
        self._last: Seen[P] | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self.transport = transport
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER)
        self.worker.deadlines.watch(self)
        if not self._listener.opened(self):
            self._refuse(Overloaded("the limit on connections is reached (MESH_MAX_CONNECTIONS)"))
            return
        self._handler.connected(self.transport)
        # A handshake may end after draining has begun; its request is then awaited, but not long.
        timeouts = self.worker.timeouts
        patience = timeouts.head if self._listener.draining else timeouts.idle
        self.deadline = self.worker.clock() + patience

    def data_received(self, data: bytes) -> None:
        """Take what was read."""
        exchange = self._exchange
        if exchange is not None:
            exchange.request_data(data)
        elif self._lingering:
            pass
        elif self._last is not None and data == self._last.head and not self._pending:
            self._repeat(self._last)
        else:
            self._head_data(data)

    def eof_received(self) -> bool:
        """Let a client that has only finished sending get its answer (plain TCP)."""
        self._saw_eof = True
        exchange = self._exchange
        if exchange is None or self._tunnel:
            return False
        if exchange.request_done and self.transport.can_write_eof():  # TLS has no half-close here
            return True
        if exchange.status:
            self.cut()  # a response that has begun ends here, and must not look whole
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the exchange."""
        self.worker.deadlines.unwatch(self)
        self._listener.closed(self)
        if self._exchange is not None:
            self._exchange.client_lost()
        let_go(self.transport)

    def pause_writing(self) -> None:
        """Pause the response's source."""
        self.writable = False
        if self._exchange is not None:
            self._exchange.client_writable(False)

    def resume_writing(self) -> None:
        """Let the response's source, or the next request, go on."""
        self.writable = True
        if self._exchange is not None:
            self._exchange.client_writable(True)
        elif self._pending:
            self.worker.loop.call_soon(self._next)
        else:
            self.resume_reading()

    # What the sweep and the listener call.

    def expire(self, now: float) -> None:
        """Act on the deadline of whatever is being waited for."""
        self.deadline = NEVER
        if self._exchange is not None:
            self._exchange.timed_out()
        else:
            self.transport.abort()

    def waiting_since(self) -> float:
        """See `Connection`."""
        if (
            self._exchange is not None
            or self._head_started
            or self._lingering
            or self._pending
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size()
        ):
            return NEVER
        return self.deadline - self.worker.timeouts.idle

    def drain(self) -> None:
        """See `Connection`."""
        if self._exchange is None and not self._head_started and not self._lingering:
            if self.writable:
                # TLS waits for the client's close_notify, and a frozen client never sends it.
                self.deadline = self.worker.clock() + self.worker.timeouts.linger
            self.transport.close()

    # Heads.

    def _head_data(self, data: bytes) -> None:
        seen = len(self._pending) if self._head_started else 0
        if self._pending:
            data = self._pending + data
            self._pending = b""
        if data.startswith(b"\r\n"):  # RFC 9112 2.2: empty lines before a request are passed over
            data = _after_empty_lines(b"", data)
            seen = 0
        end = data.find(b"\r\n\r\n", max(0, seen - 3))
        try:
            if end < 0:
                self._incomplete(data, seen)
            elif end > MAX_HEAD_BYTES - 4:
                self._incomplete(data[: end + 4], seen)
            else:
                self._begin(data, end)
        except MeshError as error:
            self._refuse(error, find_request_id(data))

    def _incomplete(self, data: bytes, seen: int) -> None:
        """Wait for the rest of a head, unless what is there can never become one.

        The first `seen` bytes have been looked at before.
        """
        if not self._head_started and data:
            self._head_started = True
            self.deadline = self.worker.clock() + self.worker.timeouts.head
        if has_bare_lf(data, seen):
            raise BadRequest("the head has a line that ends in a bare LF")
        eol = data.find(b"\r\n")
        if eol >= 0:
            if eol + 2 > seen:
                parse_request_line(data[:eol])
        elif data not in (b"", b"\r") and not is_token(data.partition(b" ")[0]):
            raise BadRequest("what came is not HTTP/1.1; is it TLS, sent to a plain listener?")
        elif len(data) > MAX_REQUEST_LINE_BYTES + 1:  # the CR may be there, and its LF not yet
            raise UriTooLong(f"the request target is over {MAX_REQUEST_TARGET_BYTES} bytes")
        if len(data) > MAX_HEAD_BYTES:
            raise HeaderTooLarge(f"the head is over {MAX_HEAD_BYTES} bytes")
        self._pending = data

    def _begin(self, data: bytes, end: int) -> None:
        eol = data.find(b"\r\n")
        line = parse_request_line(data[:eol])
        block = data[eol + 2 : end + 2]
        plain = line.minor == 1 and line.authority is None
        last = self._last
        if plain and last is not None and block == last.block:
            plan = last.plan
        else:
            plan = self._handler.plan(line, block)
        check_body(line, plan.fields)
        self._head_started = False
        rest = data[end + 4 :]
        exchange, route = self._open(line, plan, None)
        if rest and exchange.request_done:
            self.keep_for_later(rest)
        if plain and end <= _MAX_REPEATED_BYTES:
            head = data[: end + 4] if rest else data
            went = route if isinstance(route, Route) else None
            self._last = Seen(head, line, block, plan, went)
        self._go(exchange, route, rest)

    def _repeat(self, last: Seen[P]) -> None:
        """Take a head that is the last one again, byte for byte."""
        exchange, route = self._open(last.line, last.plan, last.route)
        last.route = route if isinstance(route, Route) else None
        self._go(exchange, route, b"")

    def _open(self, line: RequestLine, plan: P, last: Route | None) -> tuple[Exchange, Decision]:
        self.deadline = NEVER
        exchange = self._exchange = Exchange(self, line, plan.fields)
        try:
            return exchange, self._handler.route(line, plan, last)
        except MeshError as error:
            return exchange, problem(error, plan.fields.request_id.decode("latin-1"))

    def _go(self, exchange: Exchange, route: Decision, rest: bytes) -> None:
        if isinstance(route, Route):
            exchange.start(route, rest)
        elif isinstance(route, Answer):
            exchange.answer(route, rest)
        else:
            exchange.answer_later(route, rest)

    def _next(self) -> None:
        """Look for a request in what was kept."""
        if self._exchange is None and not self._lingering and not self.transport.is_closing():
            data, self._pending = self._pending, b""
            if data:
                self._head_data(data)
            if self._exchange is None and self.writable:
                self.resume_reading()

    def handler(self) -> object:
        """See `Client`."""
        return self._handler

    # What the exchange calls: see `exchange.Client`.

    def write(self, data: bytes) -> None:
        """Send to the client."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def pause_reading(self) -> None:
        """Stop reading."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, unless bytes for the next exchange are held already."""
        held = self._pending and self._exchange is not None
        if self._paused and not held and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def keep_for_later(self, data: bytes) -> None:
        """Hold bytes behind the request's end, and no more than one read's worth of them."""
        self._pending += data
        self.pause_reading()

    def begin_tunnel(self) -> bytes:
        """Hand over what was held."""
        self._tunnel = True
        kept, self._pending = self._pending, b""
        if self._saw_eof:  # there is no half of a tunnel
            self.worker.loop.call_soon(self.transport.close)
        self.resume_reading()
        return kept

    def may_persist(self) -> bool:
        """Tell whether another request is welcome."""
        return not (self._listener.draining or self._saw_eof) and self._handler.may_persist()

    def exchange_ended(self, exchange: Exchange, keep: bool) -> None:
        """Record the exchange; go on with the next request, or close."""
        self._exchange = None
        self._listener.record(exchange)
        if self.transport.is_closing():
            return
        # Also on the way out: a client may never take the last of its answer.
        self.deadline = exchange.finished + self.worker.timeouts.idle
        if keep and not (self._listener.draining or self._saw_eof):
            if self.writable:
                if self._pending:
                    # Not from here: a client that pipelines would make this call itself.
                    self.worker.loop.call_soon(self._next)
                elif self._paused:
                    self.resume_reading()
            else:
                self.pause_reading()
        elif exchange.request_done or self._saw_eof:
            self.transport.close()
        else:
            self._linger()

    def cut(self) -> None:
        """End the connection with a reset: a FIN could pass for a response's end."""
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.transport.abort()

    # Refusing.

    def _refuse(self, error: MeshError, request_id: bytes = b"") -> None:
        """Answer what could not be understood as a request, and close."""
        named = request_id.decode("latin-1") or secrets.token_hex(16)
        self._listener.refused(error, named)
        answer = problem(error, named)
        self.write(answer.render(b"", b"Connection: close\r\n"))
        self._linger()

    def _linger(self) -> None:
        """Close once the client has had the time to read its answer.

        A socket closed with bytes unread sends a reset, which can destroy an answer under way
        (RFC 9112 9.6).
        """
        self._lingering = True
        self._pending = b""
        self.deadline = self.worker.clock() + self.worker.timeouts.linger
        self.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

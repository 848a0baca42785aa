"""A client's connection: finds heads in its bytes and runs one exchange after the other."""

from __future__ import annotations

import re
from typing import Final, Generic

from dstack_mesh.errors import BadRequest, HeaderTooLarge, MeshError, UriTooLong
from dstack_mesh.relay.answers import Answer, find_request_id, problem
from dstack_mesh.relay.client_end import ClientEnd
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.interfaces import Decision, Handler, Listener, P
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.seen import Seen
from dstack_mesh.wire.fields import has_bare_lf, is_token
from dstack_mesh.wire.limits import (
    MAX_HEAD_BYTES,
    MAX_REQUEST_LINE_BYTES,
    MAX_REQUEST_TARGET_BYTES,
)
from dstack_mesh.wire.request import check_body
from dstack_mesh.wire.request_line import RequestLine, parse_request_line

_after_empty_lines = re.compile(rb"\A(?:\r\n)+").sub
_MAX_REPEATED_BYTES: Final = 2048
"""What a connection may hold in memory of its last head."""


class Downstream(ClientEnd, Generic[P]):
    """The server's end of one HTTP/1.1 connection."""

    __slots__ = ("_handler", "_last")

    def __init__(self, listener: Listener, handler: Handler[P]) -> None:
        super().__init__(listener)
        self._handler = handler
        self._last: Seen[P] | None = None

    def _welcome(self) -> None:
        self._handler.connected(self.transport)

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
        """See `ClientEnd`."""
        if self._exchange is None and not self._lingering and not self.transport.is_closing():
            data, self._pending = self._pending, b""
            if data:
                self._head_data(data)
            if self._exchange is None and self.writable:
                self.resume_reading()

    def handler(self) -> object:
        """See `Client`."""
        return self._handler

    def may_persist(self) -> bool:
        """See `Client`."""
        return super().may_persist() and self._handler.may_persist()

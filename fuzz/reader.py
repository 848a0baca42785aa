"""What a strict reader that is not ours (h11) finds in a stream of HTTP/1.1 messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import h11

Fields = list[tuple[bytes, bytes]]

_BARE_LF = re.compile(rb"(?<!\r)\n")
_LIMIT = 1 << 20  # no limits of its own: those of the mesh are what is tried


@dataclass
class Message:
    """One message as h11 read it, as far as it came."""

    first: tuple[bytes, bytes]
    """Method and target, or status and reason."""
    fields: Fields
    """Names in the case in which they came."""
    minor: int
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    complete: bool = False
    persists: bool = False
    """Whether h11 would read another message behind it."""

    def named(self, name: bytes) -> list[bytes]:
        """Give the values of the fields of this lower-case name."""
        return [value for one, value in self.fields if one.lower() == name]


@dataclass
class Read:
    """All messages of a stream, and the bytes behind the last one."""

    messages: list[Message] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """The bytes of each, where they are requests."""
    rest: bytes = b""
    switched: bool = False
    """Whether the last one is a 101, and `rest` is the new protocol's."""


def read_requests(data: bytes, *, most: int = 1000) -> Read:
    """Read `most` requests, one behind the other. Raises `h11.RemoteProtocolError`."""
    found = Read(rest=data)
    while found.rest and len(found.messages) < most:
        connection = h11.Connection(h11.SERVER, _LIMIT)
        connection.receive_data(found.rest)
        head = connection.next_event()
        if not isinstance(head, h11.Request):
            break
        message = Message((head.method, head.target), _raw(head.headers), _minor(head))
        found.messages.append(message)
        _read_body(connection, message)
        before = len(found.rest)
        found.rest = connection.trailing_data[0] if message.complete else b""
        found.sizes.append(before - len(found.rest))
        if not message.complete:
            break
    return found


def read_responses(
    data: bytes, methods: Sequence[bytes], *, offered: bytes = b"", closed: bool = False
) -> Read:
    """Read the responses to requests of `methods`, interim ones included.

    `offered` is the `Upgrade` that the requests asked for; `closed`: the connection has ended
    behind `data`. Raises `h11.RemoteProtocolError`.
    """
    found = Read(rest=data)
    for method in methods:
        if not found.rest:
            break
        connection = _asked(method, offered)
        connection.receive_data(found.rest)
        if closed:
            connection.receive_data(b"")
        while True:
            head = connection.next_event()
            if not isinstance(head, h11.InformationalResponse | h11.Response):
                return found
            status = b"%d" % head.status_code
            message = Message((status, head.reason), _raw(head.headers), _minor(head))
            found.messages.append(message)
            found.rest = connection.trailing_data[0]
            if head.status_code == 101:
                found.switched = True
                return found
            if isinstance(head, h11.Response):
                break
        _read_body(connection, message)
        found.rest = connection.trailing_data[0] if message.complete else b""
        if not message.complete:
            break
    return found


def has_bare_lf(data: bytes) -> bool:
    """Tell whether h11, for which LF alone ends a line, may see lines that are none."""
    return _BARE_LF.search(data) is not None


def h11_is_stricter(error: Exception) -> bool:
    """Tell whether h11 refused what a recipient may read, or may leave out.

    RFC 9112 7.1.1 has white space before a chunk extension's semicolon as bad, but as something to
    be read; and framing fields in trailers, which the mesh takes out, must be good for h11.
    """
    text = str(error)
    if "chunk header" in text:
        return " ;" in text or "\\t;" in text
    return "Content-Length" in text or "Transfer-Encoding" in text


def _asked(method: bytes, offered: bytes) -> h11.Connection:
    connection = h11.Connection(h11.CLIENT, _LIMIT)
    fields = [(b"host", b"a")]
    if offered:
        fields += [(b"connection", b"upgrade"), (b"upgrade", offered)]
    connection.send(h11.Request(method=method, target=b"/", headers=fields))
    connection.send(h11.EndOfMessage())
    return connection


def _read_body(connection: h11.Connection, message: Message) -> None:
    pieces = []
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Data):
                pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                message.trailers = _raw(event.headers)
                message.complete = True
                message.persists = connection.their_state is not h11.MUST_CLOSE
                break
            else:
                break
    finally:
        message.body = b"".join(pieces)


def _raw(headers: Any) -> Fields:
    """Give the names as they came; h11 has its own type for fields, but not for no fields."""
    return [(bytes(n), bytes(v)) for n, v in headers.raw_items()] if len(headers) else []


def _minor(head: h11.Request | h11.Response | h11.InformationalResponse) -> int:
    return int(head.http_version[-1:])

"""Finds the server name in a TLS ClientHello, as a gateway does that never opens the connection.

Pure: bytes in, an answer out. RFC 8446 4.1.2 and 5.1 for the ClientHello, RFC 6066 3 for the name.
"""

from __future__ import annotations

MAX_SIZE = 64 * 1024
"""A ClientHello above this is refused rather than gathered."""

_HELLO = 1
_EXTENSION_SERVER_NAME = 0
_NAME_TYPE_HOST = 0
_MAX_FRAGMENT = 2**14


class MalformedHelloError(ValueError):
    """The bytes do not begin a TLS connection."""


class IncompleteHelloError(Exception):
    """More bytes are needed to tell."""


class _Cursor:
    """Reads from the front; running out means that the message is malformed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise MalformedHelloError("a length in the ClientHello goes beyond its end")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_size: int) -> bytes:
        return self.take(self.number(length_size))

    @property
    def done(self) -> bool:
        return self._at == len(self._data)


def server_name(data: bytes) -> str | None:
    """Return the server name (lower case) of the ClientHello that `data` begins with, if any.

    Raises `IncompleteHelloError` while it is not all there, `MalformedHelloError` for anything
    else or a ClientHello over `MAX_SIZE`.
    """
    hello = _Cursor(_message(data))
    hello.take(2 + 32)  # legacy version, random
    hello.vector(1)  # legacy session id
    hello.vector(2)  # cipher suites
    hello.vector(1)  # legacy compression methods
    if hello.done:
        return None
    extensions = _Cursor(hello.vector(2))
    while not extensions.done:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind == _EXTENSION_SERVER_NAME:
            return _host_name(content)
    return None


def _host_name(content: bytes) -> str | None:
    names = _Cursor(_Cursor(content).vector(2))
    while not names.done:
        kind, name = names.number(1), names.vector(2)
        if kind == _NAME_TYPE_HOST:
            try:
                return name.decode("ascii").lower()
            except UnicodeDecodeError:
                raise MalformedHelloError("the server name is not ASCII") from None
    return None


def _message(data: bytes) -> bytes:
    """Return the body of the first handshake message, gathered from one or more records."""
    gathered = b""
    at = 0
    while True:
        # What is there of a record's head must fit before more is waited for.
        head = data[at : at + 5]
        if head[:1] not in {b"", b"\x16"} or head[1:2] not in {b"", b"\x03"}:
            raise MalformedHelloError("the bytes are not a TLS handshake record")
        if len(head) < 5:
            break
        size = int.from_bytes(head[3:5], "big")
        if not 0 < size <= _MAX_FRAGMENT:
            raise MalformedHelloError(f"a record of {size} bytes is not allowed in a handshake")
        gathered += data[at + 5 : at + 5 + size]
        at += 5 + size
        if gathered[:1] not in {b"", bytes((_HELLO,))}:
            raise MalformedHelloError(f"handshake message {gathered[0]} is not a ClientHello")
        if len(gathered) >= 4:
            length = int.from_bytes(gathered[1:4], "big")
            if length > MAX_SIZE:
                raise MalformedHelloError(f"a ClientHello of {length} bytes is over {MAX_SIZE}")
            if len(gathered) >= 4 + length:
                return gathered[4 : 4 + length]
        if at > len(data):
            break
    if len(data) > 2 * MAX_SIZE:
        raise MalformedHelloError("no ClientHello came to its end")
    raise IncompleteHelloError

"""Decoders of message bodies: bytes of one connection in, payload out (RFC 9112 sections 6, 7).

A decoder is fed what was read and gives back the payload in it and how many bytes it took; what is
left belongs to the next message. It holds no payload back.
"""

from __future__ import annotations

import re
from typing import Protocol

from dstack_mesh.wire.fields import (
    MalformedError,
    TooLargeError,
    forwardable_trailers,
    has_bare_lf,
)
from dstack_mesh.wire.framing import Framing
from dstack_mesh.wire.limits import (
    MAX_CHUNK_LINE_BYTES,
    MAX_CHUNK_SIZE_DIGITS,
    MAX_HEAD_BYTES,
)

# Extensions are read over and not passed on; RFC 9112 7.1.1 lets a recipient ignore them. Quotes
# must be closed in them: some readers let a line end stand inside.
_chunk_line = re.compile(
    rb"([0-9A-Fa-f]++)"
    rb'(?:[ \t]*+;(?:[\t !#-~\x80-\xff]|"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*")*)?'
).fullmatch
_MAX_CHUNK_BYTES = 2**63 - 1
"""What every reader can count."""


class Decoder(Protocol):
    """Takes one body off a stream of bytes."""

    done: bool
    """Whether the body is complete."""

    trailers: bytes
    """Field lines to go on behind the body, once it is done."""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Give the payload found in `data` and the count of bytes taken of it.

        Raises `MalformedError` where the body breaks its framing.
        """
        ...


class LengthDecoder:
    """A body of a known number of bytes."""

    __slots__ = ("done", "remaining", "trailers")

    def __init__(self, length: int) -> None:
        self.remaining = length
        self.done = length == 0
        self.trailers = b""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """See `Decoder`."""
        size = len(data)
        if size < self.remaining:
            self.remaining -= size
            return data, size
        taken = self.remaining
        self.remaining = 0
        self.done = True
        return (data if taken == size else data[:taken]), taken


class CloseDecoder:
    """A body that ends with its connection. It is never done by what was read."""

    __slots__ = ("done", "trailers")

    def __init__(self) -> None:
        self.done = False
        self.trailers = b""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """See `Decoder`."""
        return data, len(data)


class ChunkedDecoder:
    """The chunked transfer coding, strictly: CRLF line ends, sizes of at most 16 digits."""

    __slots__ = ("_line", "_remaining", "_remove", "_state", "done", "trailers")

    _SIZE = 0
    _DATA = 1
    _DATA_END = 2
    _TRAILERS = 3

    def __init__(self, remove_trailers: frozenset[bytes]) -> None:
        self._state = self._SIZE
        self._remaining = 0
        self._line = b""
        self._remove = remove_trailers
        self.done = False
        self.trailers = b""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """See `Decoder`."""
        payload: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.done:
            if self._state == self._DATA:
                piece = data[at : at + self._remaining]
                payload.append(piece)
                at += len(piece)
                self._remaining -= len(piece)
                if self._remaining == 0:
                    self._state = self._DATA_END
            elif self._state == self._TRAILERS:
                at += self._feed_trailers(data[at:])
            else:
                at += self._feed_line(data[at : at + MAX_CHUNK_LINE_BYTES + 2])
        return (payload[0] if len(payload) == 1 else b"".join(payload)), at

    def _feed_line(self, data: bytes) -> int:
        """Take bytes up to the end of a line; act on it once it is whole."""
        end = data.find(b"\n")
        piece = data if end < 0 else data[: end + 1]
        line = self._line + piece
        if self._state == self._DATA_END and not b"\r\n".startswith(line):
            raise MalformedError("a chunk longer than its size")
        if end < 0:
            if len(line) > MAX_CHUNK_LINE_BYTES + 1:  # the CR may be there, and its LF not yet
                raise TooLargeError(f"a chunk line of over {MAX_CHUNK_LINE_BYTES} bytes")
            self._line = line
            return len(piece)
        self._line = b""
        if self._state == self._DATA_END:
            self._state = self._SIZE
        else:
            self._begin_chunk(line)
        return len(piece)

    def _begin_chunk(self, line: bytes) -> None:
        match = _chunk_line(line[:-2]) if line.endswith(b"\r\n") else None
        if match is None or len(line) - 2 > MAX_CHUNK_LINE_BYTES:
            raise MalformedError("a chunk line that is not a hexadecimal size and extensions")
        digits = match[1]
        if len(digits) > MAX_CHUNK_SIZE_DIGITS:
            raise TooLargeError(f"a chunk size of over {MAX_CHUNK_SIZE_DIGITS} digits")
        self._remaining = int(digits, 16)
        if self._remaining > _MAX_CHUNK_BYTES:
            raise TooLargeError("a chunk size of 2^63 or more")
        self._state = self._DATA if self._remaining else self._TRAILERS

    def _feed_trailers(self, data: bytes) -> int:
        """Take bytes up to the end of the trailer section (RFC 9112 7.1.2)."""
        before = len(self._line)
        text = self._line + data
        if text.startswith(b"\r\n"):
            end = 2
        else:
            found = text.find(b"\r\n\r\n", max(0, before - 3))
            end = found + 4 if found >= 0 else 0
        if (end or len(text)) > MAX_HEAD_BYTES:
            raise TooLargeError(f"trailers of over {MAX_HEAD_BYTES} bytes")
        if not end:
            if has_bare_lf(text, before):
                raise MalformedError("trailers with a bare LF")
            self._line = text
            return len(data)
        self._line = b""
        self.trailers = forwardable_trailers(text[: end - 2], self._remove)
        self.done = True
        return end - before


def decoder(framing: Framing, length: int, remove_trailers: frozenset[bytes]) -> Decoder:
    """Make the decoder of a body that `framing`, which is not NONE, delimits."""
    if framing is Framing.LENGTH:
        return LengthDecoder(length)
    if framing is Framing.CHUNKED:
        return ChunkedDecoder(remove_trailers)
    return CloseDecoder()


def chunk(payload: bytes) -> bytes:
    """Encode one chunk; nothing for no payload, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def last_chunk(trailers: bytes) -> bytes:
    """Encode the end of a chunked body with its trailer field lines."""
    return b"0\r\n%b\r\n" % trailers

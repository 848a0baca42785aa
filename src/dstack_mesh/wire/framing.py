"""How a message's body is delimited: the one place that decides it (RFC 9112 section 6.3).

What two readers could understand differently is refused, never repaired.
"""

from __future__ import annotations

from enum import IntEnum

from dstack_mesh.wire.fields import MalformedError, list_members

_MAX_LENGTH_DIGITS = 18  # below 2**63, for every reader


class Framing(IntEnum):
    """The ways in which a body ends."""

    NONE = 0
    """There is no body."""
    LENGTH = 1
    """After `Content-Length` bytes."""
    CHUNKED = 2
    """With the last chunk and its trailers."""
    CLOSE = 3
    """With the connection; only a response can."""


def declared_framing(
    lengths: list[bytes], codings: list[bytes], minor: int
) -> tuple[Framing | None, int]:
    """Read what `Content-Length` and `Transfer-Encoding` declare.

    `lengths` and `codings` are the fields' values as they came, `minor` the digit after `HTTP/1.`.
    Gives the framing and the length, or `(None, 0)` where nothing is declared.
    Raises `MalformedError` for everything that is not plain.
    """
    if codings:
        if lengths:
            raise MalformedError("Content-Length and Transfer-Encoding together")
        if minor == 0:
            raise MalformedError("Transfer-Encoding in HTTP/1.0")
        if len(codings) != 1 or codings[0].lower() != b"chunked":
            raise MalformedError("a Transfer-Encoding other than one `chunked`")
        return Framing.CHUNKED, 0
    if not lengths:
        return None, 0
    if len(lengths) != 1:
        raise MalformedError(f"{len(lengths)} Content-Length fields; one is accepted")
    text = lengths[0]
    if not text.isdigit() or len(text) > _MAX_LENGTH_DIGITS:
        raise MalformedError(f"a Content-Length that is not 1 to {_MAX_LENGTH_DIGITS} digits")
    return Framing.LENGTH, int(text)


def request_framing(declared: Framing | None, length: int) -> Framing:
    """Decide a request's framing: without a declared one there is no body (rule 6)."""
    if declared is None or (declared is Framing.LENGTH and length == 0):
        return Framing.NONE
    return declared


def response_framing(method: bytes, status: int, declared: Framing | None, length: int) -> Framing:
    """Decide a final or interim response's framing (rules 1, 2, 4, 5, 7 and 8).

    Raises `MalformedError` for a 1xx or 204 that declares a body (RFC 9110 8.6, RFC 9112 6.1),
    and for a 205 that may have one (RFC 9110 15.3.6).
    """
    if status < 200 or status == 204:
        if declared is Framing.CHUNKED or length:
            raise MalformedError(f"a {status} response that declares a body")
        return Framing.NONE
    if method == b"HEAD" or status == 304:
        return Framing.NONE
    if status == 205 and (declared is not Framing.LENGTH or length):
        raise MalformedError("a 205 response that has, or may have, a body")
    if declared is None:
        return Framing.CLOSE
    if declared is Framing.LENGTH and length == 0:
        return Framing.NONE
    return declared


def connection_options(values: list[bytes]) -> frozenset[bytes]:
    """Give the lower-cased options of all `Connection` fields (RFC 9110 7.6.1).

    Raises `MalformedError` where an option names a field that must not be dropped.
    """
    options = frozenset(member for value in values for member in list_members(value))
    forbidden = options & {b"host", b"content-length"}
    if forbidden:
        name = min(forbidden).decode("ascii")
        raise MalformedError(f"Connection lists `{name}`, which is not a field of one connection")
    return options


def persists(minor: int, options: frozenset[bytes]) -> bool:
    """Tell whether the connection stays open after the message (RFC 9112 9.3)."""
    if b"close" in options:
        return False
    return minor == 1 or b"keep-alive" in options

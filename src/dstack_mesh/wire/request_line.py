"""Request lines: the method, the target in each of its forms, the version."""

from __future__ import annotations

import re
from typing import Final

from dstack_mesh.errors import BadRequest, UriTooLong
from dstack_mesh.wire.fields import TOKEN
from dstack_mesh.wire.limits import MAX_REQUEST_LINE_BYTES, MAX_REQUEST_TARGET_BYTES

# RFC 9112 section 3: one space between the parts. A fragment is never part of a request target.
_request_line = re.compile(rb"(" + TOKEN + rb"++) ([!\"$-~]++) HTTP/1\.([01])").fullmatch
# RFC 3986 3.2.2 and 3.2.3: a name or address, and a port. RFC 9110 4.2.4: no userinfo.
_HOST = rb"(?:[A-Za-z0-9\-._~%!$&'*+,;=()]++|\[[0-9A-Fa-f:.]++\])(?::[0-9]*+)?"
_absolute_form = re.compile(rb"https?://(" + _HOST + rb")([/?].*+)?", re.IGNORECASE).fullmatch
valid_host = re.compile(rb"(?:" + _HOST + rb")?").fullmatch
"""Matches what a `Host` field may say: a host and perhaps a port, or nothing."""


class RequestLine:
    """The first line of a request (RFC 9112 section 3). Never changed once made."""

    __slots__ = ("authority", "method", "minor", "target")

    def __init__(
        self, method: bytes, target: bytes, minor: int, authority: bytes | None = None
    ) -> None:
        self.method = method
        self.target = target
        """In origin-form, or `*`; an absolute-form is turned to origin-form."""
        self.minor = minor
        """0 or 1: the digit after `HTTP/1.`."""
        self.authority = authority
        """What stood in an absolute-form; it takes the place of `Host` (RFC 9112 3.2.2)."""


def parse_request_line(line: bytes) -> RequestLine:
    """Parse a request line without its CRLF. Raises `BadRequest` or `UriTooLong`."""
    if line[-9:] == b" HTTP/1.1" and len(line) < MAX_REQUEST_TARGET_BYTES:
        # What nearly all are, without the cost of an expression.
        method, _, rest = line.partition(b" ")
        target = rest[:-9]
        if method in _METHODS and target[:1] == b"/" and not target.translate(None, _TARGET_BYTES):
            return RequestLine(method, target, 1)
    return _parse_rare_line(line)


_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"))
_TARGET_BYTES: Final = bytes(byte for byte in range(0x21, 0x7F) if byte != 0x23)


def _parse_rare_line(line: bytes) -> RequestLine:
    match = _request_line(line)
    if match is None:
        if len(line) > MAX_REQUEST_TARGET_BYTES:
            raise UriTooLong(_TOO_LONG)
        raise BadRequest("the request line is not `METHOD target HTTP/1.1` or `HTTP/1.0`")
    method, target, minor = match.groups()
    if len(target) > MAX_REQUEST_TARGET_BYTES or len(line) > MAX_REQUEST_LINE_BYTES:
        raise UriTooLong(_TOO_LONG)
    if method == b"CONNECT":
        raise BadRequest("CONNECT is not served; name the target app in `x-dstack-target-app`")
    if target[0] == 0x2F or (target == b"*" and method == b"OPTIONS"):
        return RequestLine(method, target, minor[0] - 0x30)
    return _from_absolute_form(method, target, minor[0] - 0x30)


_TOO_LONG = f"the request target is over {MAX_REQUEST_TARGET_BYTES} bytes"


def _from_absolute_form(method: bytes, target: bytes, minor: int) -> RequestLine:
    match = _absolute_form(target)
    if match is None:
        raise BadRequest("the request target is neither a path nor an http URL")
    authority, rest = match.groups()
    if rest is None:
        # RFC 9112 3.2.4: OPTIONS on a URL without path and query is meant for the server.
        rest = b"*" if method == b"OPTIONS" else b"/"
    elif rest[0] == 0x3F:
        rest = b"/" + rest
    return RequestLine(method, rest, minor, authority)

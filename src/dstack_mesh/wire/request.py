"""Request heads: from bytes to what is understood of them, and the bytes that go on."""

from __future__ import annotations

import re
from typing import NamedTuple

from dstack_mesh.errors import BadRequest, HeaderTooLarge, UriTooLong
from dstack_mesh.wire.fields import (
    HOP_BY_HOP,
    TOKEN,
    Field,
    MalformedError,
    TooLargeError,
    likeness,
    list_members,
    parse_fields,
    serialise,
)
from dstack_mesh.wire.framing import (
    Framing,
    connection_options,
    declared_framing,
    persists,
    request_framing,
)
from dstack_mesh.wire.limits import MAX_REQUEST_LINE_BYTES, MAX_REQUEST_TARGET_BYTES

# RFC 9112 section 3: one space between the parts. A fragment is never part of a request target.
_request_line = re.compile(rb"(" + TOKEN + rb"++) ([!\"$-~]++) HTTP/1\.([01])").fullmatch
_HOST = rb"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]"  # RFC 3986 3.2.2 and 3.2.3, without userinfo
_absolute_form = re.compile(rb"https?://(" + _HOST + rb"++)([/?].*+)?", re.IGNORECASE).fullmatch
_valid_host = re.compile(_HOST + rb"*+").fullmatch
_protocol = re.compile(TOKEN + rb"++(?:/" + TOKEN + rb"++)?").fullmatch  # RFC 9110 7.8


class RequestLine(NamedTuple):
    """The first line of a request (RFC 9112 section 3)."""

    method: bytes
    target: bytes
    """In origin-form, or `*`; an absolute-form is turned to origin-form."""
    minor: int
    """0 or 1: the digit after `HTTP/1.`."""
    authority: bytes | None = None
    """What stood in an absolute-form; it takes the place of `Host` (RFC 9112 3.2.2)."""


class RequestFields:
    """What a request's field lines say, whatever its first line is. Never changed once made."""

    __slots__ = (
        "_options",
        "forwarded",
        "framing",
        "host",
        "length",
        "removed",
        "request_id",
        "upgrade",
    )

    def __init__(
        self,
        *,
        forwarded: bytes,
        framing: Framing,
        length: int,
        host: bytes | None,
        options: frozenset[bytes],
        upgrade: bytes,
        removed: list[Field],
        request_id: bytes,
    ) -> None:
        self.forwarded = forwarded
        """Field lines that go on, in their order, each ended by CRLF."""
        self.framing = framing
        self.length = length
        """The body's bytes where `framing` is LENGTH."""
        self.host = host
        self._options = options
        self.upgrade = upgrade
        """The protocols asked for, without those the mesh cannot carry; empty for none."""
        self.removed = removed
        """Fields of the `remove` set: lower-cased names and values, in their order."""
        self.request_id = request_id
        """The first `x-request-id`, or empty."""

    def persists(self, minor: int) -> bool:
        """Tell whether the client keeps its connection open after this exchange."""
        return persists(minor, self._options)


def parse_request_line(line: bytes) -> RequestLine:
    """Parse a request line without its CRLF. Raises `BadRequest` or `UriTooLong`."""
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


def parse_request_fields(
    block: bytes, minor: int, remove: frozenset[bytes], authority: bytes | None = None
) -> RequestFields:
    """Parse a request's field lines and decide what of them goes on.

    `remove` holds the names (by `likeness`) that are taken out and handed over in `removed`.
    `authority`, where given, takes the place of `Host`. Raises `BadRequest`, `HeaderTooLarge`.
    """
    try:
        return _understand(parse_fields(block), minor, remove, authority)
    except TooLargeError as error:
        raise HeaderTooLarge(f"the head has {error}") from error
    except MalformedError as error:
        raise BadRequest(f"the request has {error}") from error


def _understand(
    fields: list[Field], minor: int, remove: frozenset[bytes], authority: bytes | None
) -> RequestFields:
    singles: dict[bytes, list[bytes]] = {name: [] for name in _READ}
    kept: list[Field] = []
    removed: list[Field] = []
    for field in fields:
        lower = field[0].lower()
        alike = likeness(lower)
        if alike in remove:
            removed.append((lower, field[1]))
            continue
        values = singles.get(lower)
        if values is not None:
            values.append(field[1])
        elif alike in _NO_LOOKALIKES:
            raise MalformedError(f"a field that some readers take for `{alike.decode('ascii')}`")
        if lower not in HOP_BY_HOP:
            kept.append(field)
    options = connection_options(singles[b"connection"])
    declared, length = declared_framing(
        singles[b"content-length"], singles[b"transfer-encoding"], minor
    )
    upgrade = _upgrade(singles[b"upgrade"], options, minor)
    nominated = options - _READ_OPTIONS
    if nominated:
        kept = [field for field in kept if field[0].lower() not in nominated]
    host = _host(singles[b"host"], minor)
    if authority is not None:
        host = authority
        kept = _with_authority(kept, authority)
    forwarded = serialise(kept) + _connection_lines(
        declared is Framing.CHUNKED, singles[b"te"], upgrade
    )
    ids = singles[b"x-request-id"]
    return RequestFields(
        forwarded=forwarded,
        framing=request_framing(declared, length),
        length=length,
        host=host,
        options=options,
        upgrade=upgrade,
        removed=removed,
        request_id=ids[0] if ids else b"",
    )


_READ = (
    b"connection",
    b"content-length",
    b"host",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"transfer-encoding",
    b"upgrade",
    b"x-request-id",
)
_READ_OPTIONS = frozenset((b"close",)) | HOP_BY_HOP


_NO_LOOKALIKES = frozenset((b"content-length", b"host", b"transfer-encoding"))
"""Fields whose look-alikes (`content_length`) would be a second opinion on the message."""


def _host(values: list[bytes], minor: int) -> bytes | None:
    if len(values) > 1:
        raise MalformedError(f"{len(values)} Host fields; one is accepted")
    if not values and minor == 1:
        raise MalformedError("no Host field")
    if values and not _valid_host(values[0]):
        raise MalformedError("a Host that is not a host and port")
    return values[0] if values else None


def _with_authority(kept: list[Field], authority: bytes) -> list[Field]:
    """Let the absolute-form's authority take `Host`'s place (RFC 9112 3.2.2)."""
    others = [field for field in kept if field[0].lower() != b"host"]
    return [(b"Host", authority), *others]


_NEVER_ASKED_FOR = (b"h2", b"h3", b"http/", b"tls/")


def _upgrade(values: list[bytes], options: frozenset[bytes], minor: int) -> bytes:
    """Give the protocols that may be asked for on the client's behalf; malformed ones are left out.

    HTTP/2 and TLS inside an upgraded connection would carry requests that no rule has seen.
    """
    if not values or minor == 0 or b"upgrade" not in options:
        return b""
    offered = [p.strip(b" \t") for value in values for p in value.split(b",")]
    return b", ".join(
        [p for p in offered if _protocol(p) and not p.lower().startswith(_NEVER_ASKED_FOR)]
    )


def _connection_lines(chunked: bool, te: list[bytes], upgrade: bytes) -> bytes:
    options: list[bytes] = []
    lines = b"Transfer-Encoding: chunked\r\n" if chunked else b""
    if any(b"trailers" in list_members(value) for value in te):
        lines += b"TE: trailers\r\n"
        options.append(b"TE")
    if upgrade:
        lines += b"Upgrade: %b\r\n" % upgrade
        options.append(b"Upgrade")
    if options:
        lines += b"Connection: %b\r\n" % b", ".join(options)
    return lines

"""Requests' field lines: from bytes to what is understood of them, and the bytes that go on."""

from __future__ import annotations

import re
from typing import Final

from dstack_mesh.errors import BadRequest, HeaderTooLarge
from dstack_mesh.wire.fields import (
    HOP_BY_HOP,
    NO_LOOKALIKES,
    TOKEN,
    Field,
    MalformedError,
    TooLargeError,
    likeness,
    list_members,
    parse_fields,
    serialise,
    with_plain_length,
)
from dstack_mesh.wire.framing import (
    Framing,
    connection_options,
    declared_framing,
    persists,
    request_framing,
)
from dstack_mesh.wire.request_line import RequestLine, valid_host
from dstack_mesh.wire.usual import Usual, UsualHeads

_protocol = re.compile(TOKEN + rb"++(?:/" + TOKEN + rb"++)?").fullmatch  # RFC 9110 7.8


class RequestFields:
    """What a request's field lines say, whatever its first line is. Never changed once made."""

    __slots__ = (
        "_keeps",
        "forwarded",
        "framing",
        "has_body",
        "host",
        "length",
        "nominated",
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
        keeps: tuple[bool, bool],
        upgrade: bytes,
        removed: list[Field],
        request_id: bytes,
        nominated: frozenset[bytes] = frozenset(),
    ) -> None:
        self.forwarded = forwarded
        """Field lines that go on, in their order, each ended by CRLF."""
        self.framing = framing
        self.has_body = framing is not Framing.NONE
        self.length = length
        """The body's bytes where `framing` is LENGTH."""
        self.host = host
        self._keeps = keeps
        self.upgrade = upgrade
        """The protocols asked for, without those the mesh cannot carry; empty for none."""
        self.removed = removed
        """Fields of the `remove` set: lower-cased names and values, in their order."""
        self.nominated = nominated
        """Names, by their `likeness`, that `Connection` lists: no trailers of theirs go on."""
        self.request_id = request_id
        """The first `x-request-id`, or empty."""

    def persists(self, minor: int) -> bool:
        """Tell whether the client keeps its connection open after this exchange."""
        return self._keeps[minor]


def check_body(line: RequestLine, fields: RequestFields) -> None:
    """Refuse a body where readers are known not to look for one. Raises `BadRequest`."""
    if not fields.has_body:
        return
    if line.method == b"TRACE":
        raise BadRequest("a TRACE request with a body (RFC 9110 9.3.8)")
    if line.minor == 0 and line.method in _NO_BODY_IN_1_0:
        method = line.method.decode("ascii")
        raise BadRequest(f"a {method} request with a body in HTTP/1.0")


_NO_BODY_IN_1_0 = frozenset((b"DELETE", b"GET", b"HEAD", b"OPTIONS"))


def parse_request_fields(
    block: bytes, minor: int, remove: frozenset[bytes], authority: bytes | None = None
) -> RequestFields:
    """Parse a request's field lines and decide what of them goes on.

    `remove` holds the names (by `likeness`) that are taken out and handed over in `removed`.
    `authority`, where given, takes the place of `Host`. Raises `BadRequest`, `HeaderTooLarge`.
    """
    try:
        if authority is None:
            heads = _usual_heads.get(remove)
            if heads is None:
                heads = _usual_heads.setdefault(remove, UsualHeads(remove))
            usual = heads.read(block)
            if usual is not None and not (usual.chunked and minor == 0):
                return _usual(usual, minor)
        return _understand(parse_fields(block), minor, remove, authority)
    except TooLargeError as too_large:
        raise HeaderTooLarge(f"the head has {too_large}") from too_large
    except MalformedError as error:
        raise BadRequest(f"the request has {error}") from error


def _understand(
    fields: list[Field], minor: int, remove: frozenset[bytes], authority: bytes | None
) -> RequestFields:
    read: dict[bytes, list[bytes]] = {}
    kept: list[Field] = []
    removed: list[Field] = []
    for field in fields:
        name, value = field
        lower, alike = name.lower(), likeness(name)
        if alike in remove:
            removed.append((lower, value))
            continue
        if lower in _READ:
            read.setdefault(lower, []).append(value)
        elif alike in NO_LOOKALIKES:
            raise MalformedError(f"a field that some readers take for `{alike.decode('ascii')}`")
        if lower not in HOP_BY_HOP:
            kept.append(field)
    options = connection_options(read.get(b"connection", []))
    declared, length = declared_framing(
        read.get(b"content-length", []), read.get(b"transfer-encoding", []), minor
    )
    upgrade = _upgrade(read.get(b"upgrade", []), options, minor)
    nominated = options - _READ_OPTIONS
    if nominated:
        kept = [field for field in kept if field[0].lower() not in nominated]
    host = _host(read.get(b"host", []), minor)
    if authority is not None:
        host = authority
        kept = [(b"Host", host), *(field for field in kept if field[0].lower() != b"host")]
    forwarded = serialise(kept)
    if declared is Framing.LENGTH:
        forwarded = with_plain_length(forwarded, read[b"content-length"][0], length)
    chunked = declared is Framing.CHUNKED
    if chunked or upgrade or b"te" in read:
        forwarded += _connection_lines(chunked, read.get(b"te", []), upgrade)
    return RequestFields(
        forwarded=forwarded,
        framing=request_framing(declared, length),
        length=length,
        host=host,
        keeps=(persists(0, options), persists(1, options)),
        upgrade=upgrade,
        removed=removed,
        request_id=read.get(b"x-request-id", [b""])[0],
        nominated=frozenset(map(likeness, nominated)),
    )


_usual_heads: Final[dict[frozenset[bytes], UsualHeads]] = {}
"""By what is removed: there are two or three such sets."""


def _usual(usual: Usual, minor: int) -> RequestFields:
    """Do as `_understand` does, for what is usual."""
    host = usual.host
    if host is None:
        if minor == 1:
            raise MalformedError(_NO_HOST)
    elif host not in _known_hosts:
        if not valid_host(host):
            raise MalformedError(_BAD_HOST)
        if len(_known_hosts) >= _MAX_KNOWN_HOSTS:
            _known_hosts.clear()
        if len(host) <= _MAX_KNOWN_HOST_BYTES:
            _known_hosts.add(host)
    forwarded, framing = usual.rest, Framing.NONE
    if usual.chunked:
        framing = Framing.CHUNKED
        forwarded += b"Transfer-Encoding: chunked\r\n"
    elif usual.length > 0:
        framing = Framing.LENGTH
    return RequestFields(
        forwarded=forwarded,
        framing=framing,
        length=max(usual.length, 0),
        host=host,
        keeps=_KEEPS_CLOSE if usual.close else _KEEPS_ALIVE if usual.keep_alive else _KEEPS,
        upgrade=b"",
        removed=usual.removed,
        request_id=usual.request_id,
        nominated=_NONE,
    )


_KEEPS: Final = (False, True)
"""Whether a client of HTTP/1.0 and 1.1 keeps its connection open, where it does not say."""
_KEEPS_ALIVE: Final = (True, True)
_KEEPS_CLOSE: Final = (False, False)

_known_hosts: Final[set[bytes]] = set()
"""Values of `Host` that were found valid."""
_MAX_KNOWN_HOSTS: Final = 256
_MAX_KNOWN_HOST_BYTES: Final = 255
_NO_HOST: Final = "no Host field"
_BAD_HOST: Final = "a Host that is not a host and port"


_READ: Final = frozenset(
    (
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
)
_READ_OPTIONS: Final = frozenset((b"close",)) | HOP_BY_HOP
_NONE: Final[frozenset[bytes]] = frozenset()


def _host(values: list[bytes], minor: int) -> bytes | None:
    if len(values) > 1:
        raise MalformedError(f"{len(values)} Host fields; one is accepted")
    if not values and minor == 1:
        raise MalformedError(_NO_HOST)
    if values and not valid_host(values[0]):
        raise MalformedError(_BAD_HOST)
    return values[0] if values else None


_NEVER_ASKED_FOR = frozenset((b"h2", b"h2c", b"h3", b"http", b"tls"))


def _upgrade(values: list[bytes], options: frozenset[bytes], minor: int) -> bytes:
    """Give the protocols that may be asked for on the client's behalf; malformed ones are left out.

    HTTP/2 and TLS inside an upgraded connection would carry requests that no rule has seen.
    """
    if not values or minor == 0 or b"upgrade" not in options:
        return b""
    offered = [p.strip(b" \t") for value in values for p in value.split(b",")]
    return b", ".join(
        [
            protocol
            for protocol in offered
            if _protocol(protocol)
            and protocol.lower().partition(b"/")[0].partition(b"-")[0] not in _NEVER_ASKED_FOR
        ]
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

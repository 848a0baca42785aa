"""Response heads: from bytes to what is understood of them, and the bytes that go on."""

from __future__ import annotations

import re
from typing import Final

from dstack_mesh.errors import UpstreamProtocolError
from dstack_mesh.wire.fields import (
    HOP_BY_HOP,
    NO_LOOKALIKES,
    Field,
    MalformedError,
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
)
from dstack_mesh.wire.usual import Usual, UsualHeads

# RFC 9112 section 4; the space before an absent reason may be missing, as many servers have it.
_status_line = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*+))?").fullmatch


class StatusLine:
    """The first line of a response. Never changed once made."""

    __slots__ = ("minor", "rest", "status")

    def __init__(self, minor: int, status: int, rest: bytes) -> None:
        self.minor = minor
        """0 or 1: the digit after `HTTP/1.`."""
        self.status = status
        self.rest = rest
        """Status code, space and reason, as they go on."""


class ResponseFields:
    """What a response's field lines say, whatever its status is. Never changed once made."""

    __slots__ = ("_options", "declared", "forwarded", "length", "nominated", "removed", "upgrade")

    def __init__(
        self,
        *,
        forwarded: bytes,
        declared: Framing | None,
        length: int,
        options: frozenset[bytes],
        upgrade: bytes,
        removed: list[Field],
        nominated: frozenset[bytes] = frozenset(),
    ) -> None:
        self.forwarded = forwarded
        """Field lines that go on, in their order, without `Transfer-Encoding`."""
        self.declared = declared
        self.length = length
        self._options = options
        self.nominated = nominated
        """Names, by their `likeness`, that `Connection` lists: no trailers of theirs go on."""
        self.upgrade = upgrade
        """The protocol that a 101 switches to; empty for none."""
        self.removed = removed
        """Fields of the `remove` set: lower-cased names and values, in their order."""

    def persists(self, minor: int) -> bool:
        """Tell whether the server keeps its connection open after this exchange."""
        return persists(minor, self._options)


def parse_status_line(line: bytes) -> StatusLine:
    """Parse a status line without its CRLF. Raises `UpstreamProtocolError`."""
    match = _status_line(line)
    if match is None:
        raise UpstreamProtocolError("the response does not begin with a valid HTTP/1 status line")
    minor, status, reason = match.groups()
    return StatusLine(minor[0] - 0x30, int(status), b"%b %b" % (status, reason or b""))


def parse_response_fields(block: bytes, minor: int, remove: frozenset[bytes]) -> ResponseFields:
    """Parse a response's field lines and decide what of them goes on.

    `remove` holds the names (by `likeness`) that are taken out and handed over in `removed`.
    Raises `UpstreamProtocolError`.
    """
    heads = _usual_heads.get(remove)
    if heads is None:
        heads = _usual_heads.setdefault(remove, UsualHeads(remove))
    usual = heads.read(block)
    if usual is not None and usual.host is None and not (usual.chunked and minor == 0):
        return _usual(usual)
    try:
        return _understand(parse_fields(block), minor, remove)
    except MalformedError as error:
        raise UpstreamProtocolError(f"the response has {error}") from error


_READ = (b"connection", b"content-length", b"transfer-encoding", b"upgrade")
_READ_OPTIONS = frozenset((b"close",)) | HOP_BY_HOP


_usual_heads: Final[dict[frozenset[bytes], UsualHeads]] = {}
"""By what is removed."""


def _usual(usual: Usual) -> ResponseFields:
    """Do as `_understand` does, for what is usual."""
    declared: Framing | None = None
    if usual.chunked:
        declared = Framing.CHUNKED
    elif usual.length >= 0:
        declared = Framing.LENGTH
    return ResponseFields(
        forwarded=usual.rest,
        declared=declared,
        length=max(usual.length, 0),
        options=_OPTION_CLOSE if usual.close else _OPTION_KEEP if usual.keep_alive else _NONE,
        upgrade=b"",
        removed=usual.removed,
        nominated=_NONE,
    )


_NONE: Final[frozenset[bytes]] = frozenset()
_OPTION_CLOSE: Final = frozenset((b"close",))
_OPTION_KEEP: Final = frozenset((b"keep-alive",))


def _understand(fields: list[Field], minor: int, remove: frozenset[bytes]) -> ResponseFields:
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
        elif alike in NO_LOOKALIKES:
            raise MalformedError(f"a field that some readers take for `{alike.decode('ascii')}`")
        if lower not in HOP_BY_HOP:
            kept.append(field)
    options = connection_options(singles[b"connection"])
    declared, length = declared_framing(
        singles[b"content-length"], singles[b"transfer-encoding"], minor
    )
    nominated = options - _READ_OPTIONS
    if nominated:
        kept = [field for field in kept if field[0].lower() not in nominated]
    upgrade = b", ".join(singles[b"upgrade"]) if b"upgrade" in options else b""
    forwarded = serialise(kept)
    if declared is Framing.LENGTH:
        forwarded = with_plain_length(forwarded, singles[b"content-length"][0], length)
    return ResponseFields(
        forwarded=forwarded,
        declared=declared,
        length=length,
        options=options,
        upgrade=upgrade,
        removed=removed,
        nominated=frozenset(map(likeness, nominated)),
    )


def switches_to(offered: bytes, chosen: bytes) -> bool:
    """Tell whether a 101's protocols are among those that the request offered (RFC 9110 7.8)."""
    protocols = list_members(chosen)
    return bool(protocols) and set(protocols) <= set(list_members(offered))

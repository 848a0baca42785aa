"""Field lines of heads and trailers: strict parsing, and the rules that all of them share.

The grammar is that of RFC 9112 section 5 without its tolerances: no white space before the colon,
no folding, no bare CR or LF, no control bytes in values.
"""

from __future__ import annotations

import re

from dstack_mesh.wire.limits import MAX_FIELDS

Field = tuple[bytes, bytes]
"""Name as it came, and value without the white space around it."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"

# Possessive quantifiers: a hostile value full of blanks must not make the matcher backtrack.
# Matched lines are counted against the block's CRs and LFs, so nothing unmatched goes unnoticed.
_field_lines = re.compile(
    rb"^(" + TOKEN + rb"++):[ \t]*+([^\x00-\x08\x0a-\x1f\x7f]*+)\r\n", re.MULTILINE
).findall
_length_line = re.compile(rb"^(content-length: )[0-9]++", re.IGNORECASE | re.MULTILINE).sub
_is_token = re.compile(TOKEN + rb"++").fullmatch

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade")
)
"""Fields of one connection only (RFC 9110 7.6.1); the framing and upgrade rules write their own."""

NO_LOOKALIKES = frozenset((b"content-length", b"host", b"transfer-encoding"))
"""Fields whose look-alikes (`content_length`) would be a second opinion on the message."""

# Merged into a header section these would change how the message is read, whom it goes to, or what
# an earlier check was based on (RFC 9110 6.5.1).
_NEVER_IN_TRAILERS = HOP_BY_HOP | frozenset(
    (
        b"age",
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"date",
        b"expect",
        b"expires",
        b"host",
        b"location",
        b"max-forwards",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"range",
        b"retry-after",
        b"set-cookie",
        b"trailer",
        b"vary",
        b"www-authenticate",
        b"x-forwarded-for",
    )
)


class MalformedError(ValueError):
    """Bytes that are not what the grammar says; the message says what and where."""


class TooLargeError(MalformedError):
    """A limit of `wire.limits` is exceeded."""


def with_plain_length(block: bytes, text: bytes, length: int) -> bytes:
    """Give a block in which the `Content-Length` `text` is written as others read it too.

    Leading zeros are legal, and mean octal to some.
    """
    if text[:1] != b"0" or text == b"0":
        return block
    return _length_line(b"\\g<1>%d" % length, block)


def parse_fields(block: bytes) -> list[Field]:
    """Parse field lines, each ended by CRLF, without the blank line after the last one.

    Raises `MalformedError`, or `TooLargeError` for more than `MAX_FIELDS` lines.
    """
    fields: list[Field] = _field_lines(block)
    count = len(fields)
    if block.count(b"\n") != count or block.count(b"\r") != count:
        raise MalformedError(_what_is_wrong(block))
    if count > MAX_FIELDS:
        raise TooLargeError(f"{count} field lines; at most {MAX_FIELDS} are accepted")
    for index, (name, value) in enumerate(fields):
        if value.endswith((b" ", b"\t")):
            fields[index] = (name, value.rstrip(b" \t"))
    return fields


def has_bare_lf(data: bytes, start: int) -> bool:
    """Tell whether an LF at or behind `start` is without its CR (RFC 9112 2.2).

    What was looked at before need not be looked at again: a head may come byte by byte.
    """
    start -= data[max(0, start - 1) : start] == b"\r"
    return data.count(b"\n", start) != data.count(b"\r\n", start)


def serialise(fields: list[Field]) -> bytes:
    """Give the field lines' canonical bytes, one `name: value` CRLF each."""
    return b"".join([b"%b: %b\r\n" % field for field in fields])


def list_members(value: bytes) -> list[bytes]:
    """Split a comma-separated list, lower-cased, empty members left out (RFC 9110 5.6.1)."""
    return [member for part in value.lower().split(b",") if (member := part.strip(b" \t"))]


def is_token(value: bytes) -> bool:
    """Tell whether `value` is a token (RFC 9110 5.6.2)."""
    return _is_token(value) is not None


_ALIKE = bytes(
    ord(chr(byte).lower()) if byte < 0x80 and chr(byte).isalnum() else 0x2D for byte in range(256)
)


def likeness(name: bytes) -> bytes:
    """Give the name that a backend could take a field for, whatever its spelling.

    CGI (RFC 3875 4.1.18) and what was made after it tell neither case nor `_` from `-`, and some
    take every other sign for `-` too.
    """
    return name.translate(_ALIKE)


def forwardable_trailers(block: bytes, remove: frozenset[bytes]) -> bytes:
    """Parse a trailer section and serialise those of its fields that may go on.

    `remove` names further fields, by their `likeness`, that must not pass. Raises `MalformedError`.
    """
    kept = [
        field
        for field in parse_fields(block)
        if (alike := likeness(field[0])) not in _NEVER_IN_TRAILERS and alike not in remove
    ]
    return serialise(kept)


def _what_is_wrong(block: bytes) -> str:
    for number, line in enumerate(block.split(b"\r\n"), start=1):
        if not line or (_field_lines(line + b"\r\n") and b"\n" not in line and b"\r" not in line):
            continue
        return f"field line {number} is {_fault(line)}"
    return "a field line is empty"


def _fault(line: bytes) -> str:
    if b"\r" in line or b"\n" in line:
        return "broken by a bare CR or LF"
    if line[:1] in (b" ", b"\t"):
        return "folded or starts with white space"
    name, colon, _ = line.partition(b":")
    if not colon:
        return "without a colon"
    if not is_token(name):
        return "named by something that is not a token"
    return "valued with a control byte"

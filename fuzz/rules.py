"""What must become of a message's fields, written down a second time to hold the first against."""

from __future__ import annotations

import re

from fuzz.reader import Fields

HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"transfer-encoding",
    b"upgrade",
}
_UNPROTECTED = HOP_BY_HOP | {b"close"}

# Of interest here are the fields that change framing, routing or who somebody is; the full list is
# the mesh's own to choose.
_NOT_IN_TRAILERS = HOP_BY_HOP | {b"content-length", b"host", b"authorization", b"trailer"}

_NEVER_IN_A_HEAD = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def options(fields: Fields) -> set[bytes]:
    """Give the options of all `Connection` fields, lower-cased."""
    return members(fields, b"connection")


def members(fields: Fields, name: bytes) -> set[bytes]:
    """Give the members of all lists of this name, lower-cased."""
    lists = [value.lower() for one, value in fields if one.lower() == name]
    return {m.strip(b" \t") for value in lists for m in value.split(b",")} - {b""}


def alike(name: bytes) -> bytes:
    """Give the name that a backend could take this one for."""
    return re.sub(rb"[^a-z0-9]", b"-", name.lower())


def end_to_end(fields: Fields, removed: frozenset[bytes]) -> Fields:
    """Give the fields that must go on, in their order."""
    gone = HOP_BY_HOP | nominated(fields)
    return [
        (name, _without_zeros(value) if name.lower() == b"content-length" else value)
        for name, value in fields
        if name.lower() not in gone and alike(name) not in removed
    ]


def _without_zeros(length: bytes) -> bytes:
    """Leading zeros are octal to some."""
    return b"%d" % int(length)


def nominated(fields: Fields) -> set[bytes]:
    """Give the names of fields that `Connection` lists, so that they end here."""
    return options(fields) - _UNPROTECTED


def is_subsequence(part: Fields, whole: Fields) -> bool:
    """Tell whether `part` is `whole` with fields left out."""
    remaining = iter(whole)
    return all(one in remaining for one in part)


def check_trailers(passed: Fields, came: Fields, removed: frozenset[bytes]) -> None:
    """Hold the trailers that go on against those that came; `removed` are names, by likeness."""
    assert is_subsequence(passed, came), f"trailers made up or moved: {passed} of {came}"
    for name, _ in passed:
        assert alike(name) not in _NOT_IN_TRAILERS | removed, f"{name!r} in trailers"
    ours = {b"x-a", b"etag"} - removed
    assert [f for f in passed if f[0].lower() in ours] == [f for f in came if f[0].lower() in ours]


def check_head_bytes(head: bytes) -> None:
    """Hold a head that goes on against what no reader may be shown: control bytes, two lengths."""
    assert head.endswith(b"\r\n\r\n"), "a head without its end"
    lines = head[:-4].split(b"\r\n")
    for line in lines:
        assert line, "an empty line inside a head"
        assert not _NEVER_IN_A_HEAD.search(line), f"a control byte in {line!r}"
    names = [line.partition(b":")[0].lower() for line in lines[1:]]
    lengths = [name for name in names if name in (b"content-length", b"transfer-encoding")]
    assert len(lengths) <= 1, f"two lengths: {lengths}"
    if lengths == [b"transfer-encoding"]:
        assert b"Transfer-Encoding: chunked" in lines


def check_no_lookalikes(fields: Fields) -> None:
    """See to it that no reader finds a second length, or a second host, in a request."""
    for name in (b"content-length", b"transfer-encoding", b"host"):
        found = [one for one, _ in fields if alike(one) == name]
        assert len(found) <= 1, f"{found} for one reader or the other"
        assert all(one.lower() == name for one in found), f"{found} for some readers"

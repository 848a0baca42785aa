"""Blocks of field lines: Python's way, C's and the strict parser take the same apart."""

from __future__ import annotations

from tests.wire.in_c import module_or_none

from dstack_mesh.wire.fields import MalformedError, likeness, parse_fields, serialise
from dstack_mesh.wire.take_apart import DROP_ALIKE, DROP_EXACT, TELL_ALIKE, Found, NormalForm

TABLE = (
    (b"connection", DROP_EXACT),
    (b"host", TELL_ALIKE),
    (b"te", DROP_EXACT | TELL_ALIKE),
    (b"x-id", 0),
    (b"x-own", DROP_EXACT | DROP_ALIKE | TELL_ALIKE),
    (b"x-alike", DROP_ALIKE),
    (b"x" * 32, DROP_EXACT),
)
_NAMES = [name for name, _ in TABLE]
_FLAGS = dict(TABLE)

_COMPILED = module_or_none()
_IN_PYTHON = NormalForm(TABLE, None)
_IN_C = NormalForm(TABLE, _COMPILED) if _COMPILED is not None else None

SEEDS = (
    b"",
    b"Host: a.example:8080\r\nAccept: */*\r\nConnection: keep-alive\r\nCookie: a=1; b=2\r\n",
    b"X-Own: 1\r\nx_own: 2\r\nx.OWN: 3\r\nX-Id: 7\r\nx_id: 8\r\nX-Alike: 1\r\nX_Alike: 2\r\n",
    b"TE: trailers\r\nT_E: 1\r\nTE : 1\r\n",
    b"A: 1\r\n" * 128,
    b"A: 1\r\n" * 129,
    b"X-Own: 1\r\n" * 128,
    b"x" * 31 + b": 1\r\n" + b"x" * 32 + b": 2\r\n" + b"x" * 33 + b": 3\r\n",
    b"A: 1\r\nB: 2",
    b"A: 1\r\nB: 2\r",
    b"A:1\r\n",
    b"A:  1\r\n",
    b"A: 1 \r\n",
    b"A: \r\n",
    b"A: a\tb\r\n",
    b"A: \x00\r\n",
    b"A: \xff\r\n",
    b"a:b: c\r\n",
    b"A: 1\r\n\r\n",
    b"A: 1\nB: 2\r\n",
    b"A: 1\rB: 2\r\n",
    b" A: 1\r\n",
)


def run(data: bytes) -> None:
    expected = _expected(data)
    assert _IN_PYTHON.take_apart(data) == expected, "Python's way"
    if _IN_C is not None:
        assert _IN_C.take_apart(data) == expected, "C's way"


def _expected(block: bytes) -> tuple[bytes, list[Found]] | None:
    """Say by the strict parser what comes out."""
    try:
        fields = parse_fields(block)
    except MalformedError:
        return None
    if serialise(fields) != block or not all(value for _, value in fields) or b"\t" in block:
        return None
    found: list[Found] = []
    kept = []
    for name, value in fields:
        alike = likeness(name)
        exact = name.lower() == alike
        flags = _FLAGS.get(alike)
        if flags is not None and (exact or flags & TELL_ALIKE):
            found.append((_NAMES.index(alike), exact, name, value))
        if flags is None or not flags & (DROP_EXACT if exact else DROP_ALIKE):
            kept.append((name, value))
    return serialise(kept), found

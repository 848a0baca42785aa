"""Field lines in normal form: what of them matters, and the rest as it came.

Nearly all heads have nothing but lines `name: value`, with a token, one blank, and a value that
neither begins nor ends with one: as `fields.serialise` writes them. In these only the fields that
mean something to the mesh need be taken apart. All other forms are the strict parser's affair.

Where there is a C compiler this is done by `_take_apart.c`, and this text says what that does.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

from dstack_mesh.wire.fields import is_token, likeness
from dstack_mesh.wire.limits import MAX_FIELDS

_compiled: Any = None
with contextlib.suppress(ImportError):  # a wheel, or a checkout, without what a C compiler makes
    from dstack_mesh.wire import _take_apart

    _compiled = _take_apart

DROP_EXACT: Final = 1
"""A field of this name, in any case, does not go on."""
DROP_ALIKE: Final = 2
"""Nor does one that some readers take for it (`fields.likeness`)."""
TELL_ALIKE: Final = 4
"""Such a look-alike is told of; without this only the field itself is."""

Found = tuple[int, bool, bytes, bytes]
"""The name's place in the table, whether it is the name itself, and name and value as they came."""

_BLANK: Final = 0x20
_NOT_IN_VALUES = (*range(0x20), 0x7F)
_FINE_IN_VALUES: Final = bytes(byte for byte in range(256) if byte not in _NOT_IN_VALUES)
_MAX_ENTRIES: Final = 32
_MAX_NAME: Final = 32
_MAX_KNOWN: Final = 1024
_MAX_KNOWN_BYTES: Final = 64
_NO_NAME: Final = -2
_ORDINARY: Final = -1


class NormalForm:
    """Takes blocks of field lines apart, by a table of names and what to do with each."""

    __slots__ = ("_flags", "_in_c", "_known", "_places", "_table")

    def __init__(self, table: tuple[tuple[bytes, int], ...], in_c: Any = _compiled) -> None:
        """`table` has at most 32 names, each once: as `likeness` writes them, of 1 to 32 bytes.

        Raises ValueError for others.

        `in_c` is the module that does the work; None: it is done here.
        """
        _check(table)
        self._in_c = in_c.take_apart if in_c is not None else None
        self._table = in_c.table(table) if in_c is not None else None
        self._flags = [flags for _, flags in table]
        self._places = {name: place for place, (name, _) in enumerate(table)}
        # Names come again and again, so each is looked at once: its place, and whether it is exact.
        self._known: dict[bytes, tuple[int, bool]] = {}

    def take_apart(self, block: bytes) -> tuple[bytes, list[Found]] | None:
        """Give the lines that go on, and what was found; None for a block of another form."""
        if self._in_c is not None:
            parts: tuple[bytes, list[Found]] | None = self._in_c(block, self._table)
            return parts
        lines = block.split(b"\r\n")
        count = len(lines) - 1
        # Of control bytes there are only the line ends.
        if count > MAX_FIELDS or len(block.translate(None, _FINE_IN_VALUES)) != 2 * count:
            return None
        if lines.pop():
            return None
        found: list[Found] = []
        dropped = False
        for number, line in enumerate(lines):
            name, _, value = line.partition(b": ")
            place, exact = self._known.get(name) or self._learn(name)
            if place == _NO_NAME or not value or value[0] == _BLANK or value[-1] == _BLANK:
                return None
            if place == _ORDINARY:
                continue
            flags = self._flags[place]
            if exact or flags & TELL_ALIKE:
                found.append((place, exact, name, value))
            if flags & (DROP_EXACT if exact else DROP_ALIKE):
                lines[number] = b""
                dropped = True
        if dropped:
            block = b"".join([line + b"\r\n" for line in lines if line])
        return block, found

    def _learn(self, name: bytes) -> tuple[int, bool]:
        if not is_token(name):
            return _NO_NAME, False
        alike = likeness(name)
        place = self._places.get(alike, _ORDINARY)
        known = place, place != _ORDINARY and name.lower() == alike
        if len(name) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[name] = known
        return known


def _check(table: tuple[tuple[bytes, int], ...]) -> None:
    if len(table) > _MAX_ENTRIES:
        raise ValueError(f"{len(table)} names; at most {_MAX_ENTRIES} are looked for")
    for name, _ in table:
        if not 1 <= len(name) <= _MAX_NAME or likeness(name) != name:
            raise ValueError(f"{name!r} is not 1 to {_MAX_NAME} lower-case letters, digits and `-`")
    if len({name for name, _ in table}) != len(table):
        raise ValueError("a name is there twice")

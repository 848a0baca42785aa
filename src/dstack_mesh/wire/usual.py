"""The short way through field lines: heads in which nothing is unusual, as nearly all are.

It reads blocks in normal form (`take_apart.py`) whose framing and connection fields are each there
once, as everybody writes them. Whatever else there is, it leaves to the strict parser, which then
decides over it: this is a question of speed, never of what is accepted.
"""

from __future__ import annotations

from typing import Final

from dstack_mesh.wire.fields import Field
from dstack_mesh.wire.take_apart import DROP_ALIKE, DROP_EXACT, TELL_ALIKE, NormalForm

_CONNECTION: Final = 0
_LENGTH: Final = 1
_HOST: Final = 2
_CODING: Final = 3
_REQUEST_ID: Final = 4
_KEEP_ALIVE: Final = 5
_PROXY_CONNECTION: Final = 6
_TABLE = (
    (b"connection", DROP_EXACT),
    (b"content-length", TELL_ALIKE),
    (b"host", TELL_ALIKE),
    (b"transfer-encoding", TELL_ALIKE | DROP_EXACT),
    (b"x-request-id", 0),
    (b"keep-alive", DROP_EXACT),
    (b"proxy-connection", DROP_EXACT),
    (b"te", DROP_EXACT),
    (b"upgrade", DROP_EXACT),
)
_FIRST_REMOVED: Final = len(_TABLE)
_MAX_LENGTH_DIGITS: Final = 18

_CLOSE: Final = b"close"
_KEEP: Final = b"keep-alive"


class Usual:
    """What the fields of a usual head say."""

    __slots__ = (
        "chunked",
        "close",
        "host",
        "keep_alive",
        "length",
        "removed",
        "request_id",
        "rest",
    )

    def __init__(self, rest: bytes) -> None:
        self.rest = rest
        """The lines that go on: without `Connection`, `Transfer-Encoding` and what is removed."""
        self.removed: list[Field] = []
        """Fields of the set to remove: lower-cased names and values, in their order."""
        self.host: bytes | None = None
        self.request_id = b""
        self.length = -1
        """What `Content-Length` says; -1 where there is none."""
        self.chunked = False
        self.close = False
        self.keep_alive = False


class UsualHeads:
    """Reads the usual heads of one direction."""

    __slots__ = ("_form",)

    def __init__(self, remove: frozenset[bytes]) -> None:
        """`remove` holds the names (by `likeness`) that are taken out."""
        everything = DROP_EXACT | DROP_ALIKE | TELL_ALIKE
        self._form = NormalForm((*_TABLE, *((name, everything) for name in sorted(remove))))

    def read(self, block: bytes) -> Usual | None:
        """Give what `block` says; None where it is for the strict parser."""
        parts = self._form.take_apart(block)
        if parts is None:
            return None
        usual = Usual(parts[0])
        for place, exact, name, value in parts[1]:
            if place >= _FIRST_REMOVED:
                usual.removed.append((name.lower(), value))
            elif not exact or not _take(usual, place, value):
                return None
        if usual.chunked and usual.length >= 0:
            return None
        return usual


def _take(usual: Usual, place: int, value: bytes) -> bool:
    """Note one field; False where it is not usual."""
    if place == _HOST:
        if usual.host is not None:
            return False
        usual.host = value
    elif place == _REQUEST_ID:
        if not usual.request_id:
            usual.request_id = value
    elif place == _LENGTH:
        if usual.length >= 0 or not value.isdigit() or len(value) > _MAX_LENGTH_DIGITS:
            return False
        usual.length = int(value)
        return len(value) == 1 or value[0] != 0x30  # leading zeros: some read them as octal
    elif place == _CONNECTION:
        return _take_connection(usual, value)
    elif place == _CODING:
        if usual.chunked or value != b"chunked":
            return False
        usual.chunked = True
    else:
        return place in (_KEEP_ALIVE, _PROXY_CONNECTION)
    return True


def _take_connection(usual: Usual, value: bytes) -> bool:
    if usual.close or usual.keep_alive:
        return False
    option = value.lower()
    usual.close = option == _CLOSE
    usual.keep_alive = option == _KEEP
    return usual.close or usual.keep_alive

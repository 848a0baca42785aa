"""Which guest agent call a path means, and whether the application may make it. Pure.

interface.md, Outbound: the path's last segment is turned to PascalCase the way Rust's `heck`
0.5 does (`ToUpperCamelCase`, without its `unicode` feature); everything else stays as it is.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Literal

Expose = Literal["all", "info", "none"]

_INFO_CALLS = frozenset({b"/Info", b"/Version"})
_WORD = re.compile(rb"[0-9A-Za-z]+")
# RFC 3986 2.3: an encoded unreserved character is the same as the character itself.
_ENCODED_UNRESERVED = re.compile(
    rb"%(?:2[dDeE]|3[0-9]|4[1-9a-fA-F]|5[0-9aAfF]|6[1-9a-fA-F]|7[0-9aAeE])"
)


class _Case(Enum):
    """The case of a word's last letter so far; digits keep it."""

    NONE = 0
    LOWER = 1
    UPPER = 2


def agent_path(path: bytes) -> bytes:
    """Give the agent's path for the application's `path` (no query): `/get_quote` → `/GetQuote`.

    Encoded unreserved characters of the last segment count as the characters they are. A segment
    with other escapes or with bytes that are not ASCII names no call and is left as it is, and
    so is what is no path (`*`): the agent is to refuse it, not we to make another call of it.
    """
    folder, slash, segment = path.rpartition(b"/")
    if not slash:
        return path
    plain = _ENCODED_UNRESERVED.sub(lambda found: bytes([int(found[0][1:], 16)]), segment)
    if b"%" in plain or not plain.isascii():
        return path
    return folder + slash + _pascal_case(plain)


def exposed(path: bytes, expose: Expose) -> bool:
    """Tell whether the call at `path`, as `agent_path` gave it, is offered to the application."""
    return expose == "all" or (expose == "info" and path in _INFO_CALLS)


def _pascal_case(text: bytes) -> bytes:
    return b"".join(
        part[:1].upper() + part[1:].lower()
        for word in _WORD.findall(text)
        for part in _split_word(word)
    )


def _split_word(word: bytes) -> list[bytes]:
    """Split ASCII letters and digits after a lower-case run and before an acronym's last letter."""
    parts = []
    start, case = 0, _Case.NONE
    for i in range(len(word) - 1):
        here, after = word[i : i + 1], word[i + 1 : i + 2]
        case_before = case
        if here.islower():
            case = _Case.LOWER
        elif here.isupper():
            case = _Case.UPPER
        if case is _Case.LOWER and after.isupper():
            parts.append(word[start : i + 1])
            start = i + 1
        elif case_before is _Case.UPPER and here.isupper() and after.islower():
            parts.append(word[start:i])
            start = i
    parts.append(word[start:])
    return parts

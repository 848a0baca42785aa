"""Paths: one form for each, a refusal of those that could mean another, and patterns. Pure.

A backend decodes, merges and strips a path in ways of its own. What is left alone by all of them
is the normal form, and only on it a rule means the same here and there (RFC 3986 6.2.2, 6.2.3).
"""

from __future__ import annotations

import re

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
"""RFC 3986 2.3: encoded or not, these are the same."""

_PLAIN = frozenset(b"!$&'()*+,;=:@")
"""RFC 3986 3.3: what may stand in a path as it is. Encoded it is not the same, but most backends
read it as if it were."""

_ENCODED = 0x100
"""What stays encoded is one character in a normal path, this and its byte: so no pattern can match
a part of an encoding."""

_AS_PLAIN = {_ENCODED + byte: byte for byte in _PLAIN}

_USUAL = bytes((_UNRESERVED | _PLAIN | frozenset(b"/")) - frozenset(b";"))
"""With these alone there is no encoding, and nothing odd but what has `//` or `/.` in it."""

_MEANS_ANOTHER = re.compile(
    rb"//"  # merged by some
    rb"|/\.{1,2}(?=[/;]|%3[Bb]|\Z)"  # dot segments, also before what some cut off (`..;x`)
    rb"|%2[EeFf]|%5[Cc]|%00"  # an encoded dot, slash, backslash; what ends a C string
    rb"|%(?![0-9A-Fa-f]{2})"  # no encoding at all
    rb"|[^!\"$-\[\]-~]"  # a backslash, a fragment, and what no request line has
).search
_encodings = re.compile(r"%([0-9A-Fa-f]{2})").sub


class PathError(ValueError):
    """A path that is not in normal form; the message says what in it is not."""


def normal_path(target: bytes) -> str:
    """Give the path of a request target in the one form that patterns are matched on.

    Unreserved characters are decoded, any other encoding is one character (`_ENCODED`), and the
    query is cut off. The asterisk-form `*` stays what it is. Raises `PathError` where a backend
    could take the path for another.
    """
    path = target.partition(b"?")[0]
    usual = path[:1] == b"/" and not path.translate(None, _USUAL)
    if usual and b"//" not in path and b"/." not in path:
        return path.decode("ascii")  # what nearly all are, without the cost of an expression
    if path[:1] != b"/":
        if path == b"*":
            return "*"
        raise PathError("it does not begin with /")
    odd = _MEANS_ANOTHER(path)
    if odd is not None:
        found = path[odd.start() : max(odd.end(), odd.start() + 3)] if odd[0] == b"%" else odd[0]
        raise PathError(f"{found.decode('latin-1')!a} is in it")
    text = path.decode("ascii")
    return _encodings(_read_encoding, text) if "%" in text else text


def plain_path(path: str) -> str:
    """Give a normal path with all decoded that may stand in a path as it is.

    It is what many backends make of it: a rule that denies is matched on this form.
    """
    return path if path.isascii() else path.translate(_AS_PLAIN)


def _read_encoding(encoded: re.Match[str]) -> str:
    byte = int(encoded[1], 16)
    return chr(byte if byte in _UNRESERVED else _ENCODED + byte)


class Pattern:
    """One pattern: `*` is one segment or a part of one, not empty; `/**` is all below, and it.

    Nothing in it repeats, so matching takes a time in proportion to the path's length.
    """

    __slots__ = ("_below", "_segments", "exact")

    def __init__(self, text: str, *, plain: bool = False) -> None:
        """`plain` makes it one for paths that `plain_path` gives.

        Raises `ValueError` for what no path in normal form can match, with a reason.
        """
        try:
            path = normal_path(text.encode("ascii"))
        except UnicodeEncodeError:
            raise ValueError("it is not ASCII: encode the rest, as in /caf%C3%A9") from None
        if "?" in text or path == "*":
            raise ValueError("it is no path, which begins with / and has no query")
        self._below = path.endswith("/**")
        if self._below:
            path = path[:-3]
        if "**" in path:
            raise ValueError("** is in it other than as its last segment")
        pieces = [segment.split("*") for segment in path.split("/")]
        if plain:  # now that a `*` which was encoded is no longer taken for one that was not
            path = plain_path(path)
            pieces = [[plain_path(piece) for piece in segment] for segment in pieces]
        self.exact = None if self._below or any(len(one) > 1 for one in pieces) else path
        """The one path that it matches, where it is one."""
        self._segments = pieces

    def matches(self, path: str) -> bool:
        """Tell whether it matches `path`, which is in normal form."""
        segments = path.split("/")
        wanted = self._segments
        if len(segments) < len(wanted) or (len(segments) > len(wanted) and not self._below):
            return False
        for pieces, segment in zip(wanted, segments, strict=False):
            if len(pieces) == 1:
                if pieces[0] != segment:
                    return False
            elif not _fits(pieces, segment):
                return False
        return True


def _fits(pieces: list[str], segment: str) -> bool:
    """Tell whether `segment` is `pieces` with at least one character between each and the next."""
    first, last = pieces[0], pieces[-1]
    if not segment.startswith(first) or not segment.endswith(last):
        return False
    at = len(first)
    for piece in pieces[1:-1]:  # the leftmost place leaves the most for those behind it
        found = segment.find(piece, at + 1)
        if found < 0:
            return False
        at = found + len(piece)
    return at < len(segment) - len(last)


class PathSet:
    """Several patterns, any of which is enough."""

    __slots__ = ("_exact", "_globs")

    def __init__(self, patterns: tuple[str, ...], *, plain: bool = False) -> None:
        """See `Pattern`, which also says what it raises."""
        compiled = [Pattern(text, plain=plain) for text in patterns]
        self._exact = frozenset(one.exact for one in compiled if one.exact is not None)
        self._globs = [one for one in compiled if one.exact is None]

    def matches(self, path: str) -> bool:
        """Tell whether one of them matches `path`, which is in normal form."""
        if path in self._exact:
            return True
        for pattern in self._globs:  # noqa: SIM110 - a generator costs more than the loop
            if pattern.matches(path):
                return True
        return False

"""From fuzzed bytes to decisions: which way to go, where to split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


class Program:
    """Reads decisions off the front of an input. What is missing there is 0, or empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Count the bytes that are still there."""
        return max(0, len(self._data) - self._at)

    def byte(self) -> int:
        """Take a number from 0 to 255."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def short(self) -> int:
        """Take a number from 0 to 65535."""
        return self.byte() << 8 | self.byte()

    def take(self, size: int) -> bytes:
        """Take at most `size` bytes as they are."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def rest(self) -> bytes:
        """Take all that is left."""
        return self.take(len(self._data))


_MOST_PIECES = 48  # each may cost an execution as much as a whole input


def split(data: bytes, strides: bytes) -> Iterator[bytes]:
    """Cut `data` into pieces as long as `strides` says, over and over; a stride of 0 ends it."""
    lengths = itertools.takewhile(
        bool, itertools.islice(itertools.cycle(strides), _MOST_PIECES - 1)
    )
    at = 0
    for length in lengths:
        if at >= len(data):
            return
        yield data[at : at + length]
        at += length
    if at < len(data):
        yield data[at:]

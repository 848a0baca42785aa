"""A bounded memory of parsed field blocks: peers repeat themselves from one head to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_MAX_BLOCK_BYTES: Final = 2048
_MAX_BLOCKS: Final = 512
_MAX_SIGHTINGS: Final = 4096


class BlockMemo(Generic[T]):
    """Maps a block's exact bytes to what was made of it. Holds at most 1 MiB of keys.

    Only for what depends on the block alone, and is never changed once made. A block is taken in
    when it comes for the second time: many have a number that never comes back.
    """

    __slots__ = ("_known", "_make", "_seen")

    def __init__(self, make: Callable[[bytes], T]) -> None:
        self._make = make
        self._known: dict[bytes, T] = {}
        self._seen: set[int] = set()
        """Hashes of blocks that came once."""

    def get(self, block: bytes) -> T:
        """Give what `make` makes of `block`, and raise what it raises."""
        known = self._known.get(block)
        if known is None:
            known = self._make(block)
            if len(block) <= _MAX_BLOCK_BYTES:
                self._note(block, known)
        return known

    def _note(self, block: bytes, made: T) -> None:
        sighting = hash(block)
        if sighting in self._seen:
            # All at once: which blocks come back cannot be told from their age.
            if len(self._known) >= _MAX_BLOCKS:
                self._known.clear()
            self._known[block] = made
            return
        if len(self._seen) >= _MAX_SIGHTINGS:
            self._seen.clear()
        self._seen.add(sighting)

"""A bounded memory of parsed field blocks: peers repeat themselves from one head to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_MAX_BLOCK_BYTES = 2048
_MAX_BLOCKS = 512


class BlockMemo(Generic[T]):
    """Maps a block's exact bytes to what was made of it. Holds at most 1 MiB of keys.

    Only for what depends on the block alone, and is never changed once made.
    """

    __slots__ = ("_known", "_make")

    def __init__(self, make: Callable[[bytes], T]) -> None:
        self._make = make
        self._known: dict[bytes, T] = {}

    def get(self, block: bytes) -> T:
        """Give what `make` makes of `block`, and raise what it raises."""
        known = self._known.get(block)
        if known is None:
            known = self._make(block)
            if len(block) <= _MAX_BLOCK_BYTES:
                # All at once: which blocks come back cannot be told from their age.
                if len(self._known) >= _MAX_BLOCKS:
                    self._known.clear()
                self._known[block] = known
        return known

    def clear(self) -> None:
        """Forget everything, as when what the made values refer to has changed."""
        self._known.clear()

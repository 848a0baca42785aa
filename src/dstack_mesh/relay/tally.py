"""What the exchanges of one direction came to, as plain numbers; read when somebody asks."""

from __future__ import annotations

from typing import Final

BUCKETS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of the histogram of durations, in seconds."""

_METHODS: Final = frozenset(
    (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH")
)
_OTHER: Final = b"other"
_CLASSES: Final = 10
"""Hundreds of a status; 0 for none."""


class Tally:
    """Counts exchanges that have ended. Bounded, whatever methods clients come up with."""

    __slots__ = ("_plain", "_refused", "buckets", "bytes_down", "bytes_up", "seconds")

    def __init__(self) -> None:
        # Nearly all exchanges have no error code of the mesh's own: they are found by method alone.
        self._plain: dict[bytes, list[int]] = {}
        self._refused: dict[tuple[bytes, int, str], int] = {}
        self.bytes_up = 0
        self.bytes_down = 0
        self.buckets = [0] * (len(BUCKETS) + 1)
        """Exchanges by duration: up to each of `BUCKETS`, and the rest."""
        self.seconds = 0.0

    def add(
        self, method: bytes, status: int, code: str, up: int, down: int, seconds: float
    ) -> None:
        """Count one exchange."""
        if code:
            key = (self._known(method), status // 100, code)
            self._refused[key] = self._refused.get(key, 0) + 1
        else:
            classes = self._plain.get(method)
            if classes is None:
                classes = self._plain.setdefault(self._known(method), [0] * _CLASSES)
            classes[status // 100] += 1
        self.bytes_up += up
        self.bytes_down += down
        self.seconds += seconds
        at = 0
        for bound in BUCKETS:
            if seconds <= bound:
                break
            at += 1
        self.buckets[at] += 1

    @property
    def requests(self) -> dict[tuple[bytes, int, str], int]:
        """Exchanges by method, hundreds of the status (0 for none), and the mesh's error code."""
        found = {
            (method, hundreds, ""): count
            for method, classes in self._plain.items()
            for hundreds, count in enumerate(classes)
            if count
        }
        return {**found, **self._refused}

    def _known(self, method: bytes) -> bytes:
        return method if method in _METHODS else _OTHER

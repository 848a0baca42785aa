"""What the exchanges of one direction came to, as plain numbers; read when somebody asks."""

from __future__ import annotations

from bisect import bisect_left

BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of the histogram of durations, in seconds."""

_METHODS = frozenset(
    (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH")
)
_OTHER = b"other"


class Tally:
    """Counts exchanges that have ended. Bounded, whatever methods clients come up with."""

    __slots__ = ("buckets", "bytes_down", "bytes_up", "requests", "seconds")

    def __init__(self) -> None:
        self.requests: dict[tuple[bytes, int, str], int] = {}
        """By method, hundreds of the status (0 for none), and the mesh's own error code."""
        self.bytes_up = 0
        self.bytes_down = 0
        self.buckets = [0] * (len(BUCKETS) + 1)
        """Exchanges by duration: up to each of `BUCKETS`, and the rest."""
        self.seconds = 0.0

    def add(
        self, method: bytes, status: int, code: str, up: int, down: int, seconds: float
    ) -> None:
        """Count one exchange."""
        key = (method if method in _METHODS else _OTHER, status // 100, code)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.bytes_up += up
        self.bytes_down += down
        self.buckets[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

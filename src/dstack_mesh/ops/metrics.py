"""Counters as plain integers, turned into Prometheus text when asked for.

Names and labels are the contract's. An app-id is never a label, so cardinality is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable

from dstack_mesh.relay.exchange import Exchange

_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_METHODS = frozenset(
    (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH")
)

Sample = tuple[str, dict[str, str], float]
"""Suffix of the metric's name, labels, value."""


class _Histogram:
    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(_BUCKETS, value)] += 1
        self.sum += value


class Metrics:
    """What a worker counts, and the gauges that are read when the text is made."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._requests: Counter[tuple[str, bytes, int, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._durations: dict[str, _Histogram] = {}
        self._handshakes: Counter[tuple[str, str]] = Counter()
        self._decisions: Counter[str] = Counter()
        self._read: list[tuple[str, str, str, Callable[[], Iterable[Sample]]]] = []

    def read(
        self, name: str, kind: str, help_: str, samples: Callable[[], Iterable[Sample]]
    ) -> None:
        """Have `samples` asked for a gauge or counter each time the text is made."""
        self._read.append((name, kind, help_, samples))

    def count_handshake(self, direction: str, result: str) -> None:
        """Count a TLS handshake."""
        self._handshakes[direction, result] += 1

    def count_decision(self, decision: str) -> None:
        """Count a decision of policy."""
        self._decisions[decision] += 1

    def record(self, direction: str, exchange: Exchange, seconds: float) -> None:
        """Count an exchange that has ended; `seconds` is its duration."""
        method = exchange.line.method
        key = method if method in _METHODS else b"other"
        self._requests[direction, key, exchange.status // 100, exchange.code] += 1
        self._bytes[direction, "up"] += exchange.bytes_up
        self._bytes[direction, "down"] += exchange.bytes_down
        histogram = self._durations.get(direction)
        if histogram is None:
            histogram = self._durations[direction] = _Histogram()
        histogram.observe(seconds)

    def text(self) -> str:
        """Give the Prometheus text exposition (version 0.0.4)."""
        lines: list[str] = []
        _metric(
            lines,
            "requests_total",
            "counter",
            "Exchanges that have ended.",
            (("", _request_labels(*key), count) for key, count in sorted(self._requests.items())),
        )
        _metric(
            lines,
            "request_duration_seconds",
            "histogram",
            "From a request's head to the end of its exchange.",
            self._duration_samples(),
        )
        _metric(
            lines,
            "bytes_total",
            "counter",
            "Bytes of bodies and responses carried.",
            (
                ("", {"direction": direction, "way": way}, count)
                for (direction, way), count in sorted(self._bytes.items())
            ),
        )
        _metric(
            lines,
            "handshakes_total",
            "counter",
            "TLS handshakes.",
            (
                ("", {"direction": direction, "result": result}, count)
                for (direction, result), count in sorted(self._handshakes.items())
            ),
        )
        decisions = (("", {"decision": key}, n) for key, n in sorted(self._decisions.items()))
        _metric(lines, "policy_decisions_total", "counter", "Policy decisions.", decisions)
        for name, kind, help_, read in self._read:
            _metric(lines, name, kind, help_, read())
        build = [("", {"version": self._version}, 1)]
        _metric(lines, "build_info", "gauge", "The running version.", build)
        return "\n".join(lines) + "\n"

    def _duration_samples(self) -> Iterable[Sample]:
        for direction, histogram in sorted(self._durations.items()):
            total = 0
            for bound, count in zip((*_BUCKETS, None), histogram.counts, strict=True):
                total += count
                le = "+Inf" if bound is None else f"{bound:g}"
                yield "_bucket", {"direction": direction, "le": le}, total
            yield "_sum", {"direction": direction}, histogram.sum
            yield "_count", {"direction": direction}, total


def _request_labels(direction: str, method: bytes, status_class: int, code: str) -> dict[str, str]:
    return {
        "direction": direction,
        "method": method.decode("ascii"),
        "status_class": f"{status_class}xx" if status_class else "none",
        "code": code,
    }


def _metric(lines: list[str], name: str, kind: str, help_: str, samples: Iterable[Sample]) -> None:
    full = f"dstack_mesh_{name}"
    lines.append(f"# HELP {full} {help_}")
    lines.append(f"# TYPE {full} {kind}")
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(
            f"{full}{suffix}{{{inside}}} {value:.15g}" if inside else f"{full}{suffix} {value:.15g}"
        )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

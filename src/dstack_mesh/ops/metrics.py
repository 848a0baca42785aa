"""Counters as plain integers, turned into Prometheus text when asked for.

Names and labels are the contract's. An app-id is never a label, so cardinality is bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from dstack_mesh.relay.tally import BUCKETS, Tally

Sample = tuple[str, dict[str, str], float]
"""Suffix of the metric's name, labels, value."""


class Metrics:
    """What a worker counts, and the gauges that are read when the text is made."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._tallies: dict[str, Tally] = {}
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

    def tally(self, direction: str) -> Tally:
        """Give the counter of a direction's exchanges."""
        return self._tallies.setdefault(direction, Tally())

    def text(self) -> str:
        """Give the Prometheus text exposition (version 0.0.4)."""
        lines: list[str] = []
        _metric(
            lines,
            "requests_total",
            "counter",
            "Exchanges that have ended.",
            self._request_samples(),
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
            self._byte_samples(),
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

    def _request_samples(self) -> Iterable[Sample]:
        for direction, tally in self._used():
            for key, count in sorted(tally.requests.items()):
                yield "", _request_labels(direction, *key), count

    def _byte_samples(self) -> Iterable[Sample]:
        for direction, tally in self._used():
            yield "", {"direction": direction, "way": "down"}, tally.bytes_down
            yield "", {"direction": direction, "way": "up"}, tally.bytes_up

    def _used(self) -> list[tuple[str, Tally]]:
        return sorted((name, tally) for name, tally in self._tallies.items() if tally.requests)

    def _duration_samples(self) -> Iterable[Sample]:
        for direction, tally in self._used():
            total = 0
            for bound, count in zip((*BUCKETS, None), tally.buckets, strict=True):
                total += count
                le = "+Inf" if bound is None else f"{bound:g}"
                yield "_bucket", {"direction": direction, "le": le}, total
            yield "_sum", {"direction": direction}, tally.seconds
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

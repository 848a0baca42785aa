"""Rounds of a race: the subjects in turn, A B C A B C, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Readings = dict[str, float]
"""What one turn of one subject gave, by measure."""

MESH = "mesh"

MEASURES = {
    "cpu_us": "CPU µs per request",
    "rate": "requests/s",
    "rate_per_cpu": "requests per second of CPU",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "p999_ms": "p99.9, ms",
    "cpu_ms_100mb": "CPU ms per 100 MB",
    "cpu_us_connection": "CPU µs per new connection",
    "resumed": "share of sessions resumed",
    "kb_connection": "KB per connection",
    "kb_connection_used": "KB per connection, after 1 MB each",
    "memory_mb": "memory under load, MB",
    "idle_mb": "memory when idle, MB",
    "growth_mb": "most memory above idle, MB",
    "ready_s": "ready after, s",
    "speedup": "times the throughput of one worker",
}
"""Every measure there is, and how a table calls it."""

COMPARED = ("cpu_us", "rate_per_cpu", "cpu_ms_100mb", "cpu_us_connection")
"""Those whose ratio tells of the harness; one of times may only tell of a busy machine."""


@dataclass(frozen=True)
class Subject:
    """Something that takes part in a race."""

    name: str
    turn: Callable[[], Readings]


@dataclass(frozen=True)
class Row:
    """One measure of one scenario: a value for each round and subject."""

    scenario: str
    measure: str
    values: Mapping[str, list[float]]

    def median(self, subject: str) -> float:
        return statistics.median(self.values[subject])

    def ratios(self, peer: str) -> list[float]:
        """Give mesh to peer, round by round; what has no ratio (to nothing) is left out."""
        pairs = zip(self.values[MESH], self.values[peer], strict=True)
        return [mesh / other for mesh, other in pairs if other > 0]

    def peers(self) -> list[str]:
        return [name for name in self.values if name != MESH]


@dataclass(frozen=True)
class Spread:
    """A median, and how far the rounds lay apart."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def race(scenario: str, subjects: list[Subject], rounds: int) -> list[Row]:
    """Run all subjects once to warm up, and then in turn, `rounds` times.

    One round only has nothing to be compared with, and no warm-up.
    """
    if rounds > 1:
        for subject in subjects:
            subject.turn()
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for subject in subjects:
            for measure, value in subject.turn().items():
                found.setdefault(measure, {}).setdefault(subject.name, []).append(value)
    return [Row(scenario, measure, values) for measure, values in found.items()]


def absurd(row: Row) -> str | None:
    """Say what of a row no working harness could have found on any machine."""
    for name, values in row.values.items():
        for value in values:
            if not 0 <= value < float("inf"):
                return f"{row.scenario}: {MEASURES[row.measure]} of {name} is {value}"
    if row.measure not in COMPARED or MESH not in row.values:
        return None
    for peer in row.peers():
        ratio = spread(row.ratios(peer)).median
        if not 0.1 <= ratio <= 20:
            return f"{row.scenario}: {MEASURES[row.measure]} is {ratio:.2f} times that of {peer}"
    return None

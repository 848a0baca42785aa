"""What the project set itself to reach, and whether a run reached it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.contestants import AUTH_REQUEST, NGINX
from bench.race import MEASURES, MESH, Row, spread
from bench.results import rows


@dataclass(frozen=True)
class Target:
    """A limit for the mesh's value, or with a `peer` on its ratio to the peer's of each round."""

    part: str
    scenario: str
    """How the scenario's name begins."""

    measure: str
    limit: float
    peer: str | None = None
    at_least: bool = False


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured."""

    target: Target
    name: str
    wanted: str
    measured: str
    verdict: str


SMALL = "small GET, 32 connections"
TARGETS = (
    Target("small-get", SMALL, "cpu_us", 1.10, NGINX),
    Target("varied", "GET, 20 headers", "cpu_us", 1.35, NGINX),
    Target("latency", "small GET", "p99_ms", 1.25, NGINX),
    Target("inbound", SMALL, "cpu_us", 1.15, NGINX),
    Target("inbound", SMALL, "cpu_us", 0.5, AUTH_REQUEST),
    Target("chain", "client, server", "rate_per_cpu", 16_000, at_least=True),
    *(
        Target("bodies", f"{side}, 100 MB {way}", "cpu_ms_100mb", 0.8, NGINX)
        for side in ("outbound", "inbound")
        for way in ("down", "up")
    ),
    *(
        Target("memory", f"{side}, 512 MB {way}", "growth_mb", 16)
        for side in ("outbound", "inbound")
        for way in ("down", "up")
    ),
    Target("idle", "", "kb_connection", 50),
    Target("idle", "", "kb_connection_used", 100),
    Target("workers", "two workers", "speedup", 1.7, at_least=True),
    Target("new-inbound", "full handshake", "cpu_us_connection", 1.3, NGINX),
    Target("new-outbound", "full handshake", "cpu_us_connection", 1.3, NGINX),
)


def judge(parts: dict[str, dict[str, Any]]) -> list[Verdict]:
    """Hold the targets against the parts of a run."""
    return [_judge(target, parts) for target in TARGETS]


def _judge(target: Target, parts: dict[str, dict[str, Any]]) -> Verdict:
    part = parts.get(target.part)
    row = None if part is None else _find(target, rows(part))
    title = target.part if part is None else part["title"].partition(",")[0]
    what = MEASURES[target.measure]
    sign = "≥" if target.at_least else "≤"
    of_peer = f" of {target.peer}'s" if target.peer else ""
    wanted = f"{sign} {target.limit:,g}{of_peer}"
    if row is None:
        name = f"{title}: {target.scenario or 'first'}: {what}"
        return Verdict(target, name, wanted, "", "not measured")
    values = row.ratios(target.peer) if target.peer else row.values[MESH]
    middle = spread(values)
    measured = _number(middle.median)
    if len(values) > 1:
        measured += f" ({_number(middle.low)} to {_number(middle.high)})"
    name = f"{title}: {row.scenario}: {what}"
    return Verdict(target, name, wanted, measured, verdict(values, target.limit, target.at_least))


def _number(value: float) -> str:
    """Write one digit more than tables do, for what is close to a limit."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _find(target: Target, found: list[Row]) -> Row | None:
    for row in found:
        if (
            row.measure == target.measure
            and row.scenario.startswith(target.scenario)
            and MESH in row.values
            and (target.peer is None or target.peer in row.values)
        ):
            return row
    return None


def verdict(values: list[float], limit: float, at_least: bool) -> str:
    """Say in words whether the limit is kept, by the median and by each round."""

    def keeps(value: float) -> bool:
        return value >= limit if at_least else value <= limit

    each = [keeps(value) for value in values]
    by_median = keeps(spread(values).median)
    if all(each):
        return "met"
    if by_median:
        return f"met by the median, but only in {sum(each)} of {len(each)} rounds"
    if any(each):
        return f"not met by the median; met in {sum(each)} of {len(each)} rounds"
    return "not met"

"""Memory of connections on which nothing happens: before their use, and after 1 MB over each."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

from bench.contestants import Contestant, inbound, nginx_inbound, nginx_outbound, outbound
from bench.credentials import Files
from bench.mtls import clients
from bench.origin import Origin, origin
from bench.plan import Found, Plan
from bench.process import Process
from bench.race import MESH, Row

_SPARE = 300
_PATIENT = {"MESH_HEAD_TIMEOUT": "10m", "MESH_IDLE_TIMEOUT": "10m"}

_QUIET_SECONDS = 1.5
_SETTLE_SECONDS = 12.0


def run(plan: Plan) -> Found:
    """Inbound over TLS and outbound in plain, each subject alone."""
    count = 50 if plan.short else plan.idle
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    notes = ["nginx held a fifth as many of each: which shows what one needs as well."]
    if count + _SPARE > hard:
        notes.append(f"{count:,} connections need more open files than the limit of {hard:,}")
        count = hard - _SPARE
    rows: list[Row] = []
    with origin() as made:
        scenario = f"{count:,} inbound TLS connections"
        rows += _measure(scenario, _inbound(made, count), made.caller, count, plan)
        count = _fewer(count)
        scenario = f"{count:,} outbound plain connections"
        rows += _measure(scenario, _outbound(made, count), None, count, plan)
    return Found("Memory of idle connections", rows, notes)


def _fewer(count: int) -> int:
    return max(50, count // 5)


def _inbound(made: Origin, count: int) -> Iterator[Contestant]:
    limit = {"MESH_MAX_CONNECTIONS": str(count + _SPARE)}
    with inbound(made, _PATIENT | limit) as mesh:
        yield mesh
    with nginx_inbound(made, connections=2 * count + _SPARE) as peer:
        yield peer


def _outbound(made: Origin, count: int) -> Iterator[Contestant]:
    limit = {"MESH_MAX_CONNECTIONS": str(count + _SPARE)}
    with outbound(made, made.tls, _PATIENT | limit) as mesh:
        yield mesh
    with nginx_outbound(made, made.tls, connections=2 * count + _SPARE) as peer:
        yield peer


def _measure(
    scenario: str, contestants: Iterator[Contestant], files: Files | None, count: int, plan: Plan
) -> list[Row]:
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    with contextlib.closing(contestants):  # type: ignore[type-var]
        for one in contestants:
            with clients(one.address, 2, files, one.headers) as first:
                first.do("burst")  # what a first request loads is no connection's
            idle = _settled(one.process, plan)
            mine = count if one.name == MESH else _fewer(count)
            with clients(one.address, mine, files, one.headers) as held:
                opened = _settled(one.process, plan)
                held.do("burst")
                used = _settled(one.process, plan)
            before[one.name] = [max(0.0, (opened - idle) / mine)]
            after[one.name] = [max(0.0, (used - idle) / mine)]
    return [Row(scenario, "kb_connection", before), Row(scenario, "kb_connection_used", after)]


def _settled(process: Process, plan: Plan) -> int:
    """Give its memory in KB when it has stopped to shrink, or the time is over."""
    quiet = 0.1 if plan.short else _QUIET_SECONDS
    end = time.monotonic() + (0.3 if plan.short else _SETTLE_SECONDS)
    last = process.memory_kb()
    while True:
        time.sleep(quiet)
        now = process.memory_kb()
        if now > 0.995 * last or time.monotonic() > end:
            return now
        last = now

"""Two workers beside one: how much more goes through where each has a core to itself.

On two cores the load needs one of them, so it can't be timed. It follows from what can: both
workers run on the subject's core, and are measured for CPU per request and for the part of the
CPU time that the busier of them takes. That one is saturated first, and then

    speed-up = CPU per request with one worker / (CPU per request with two * the busier's part)
"""

from __future__ import annotations

from bench.contestants import Contestant, outbound
from bench.origin import Origin, origin
from bench.plan import Found, Plan
from bench.process import Process
from bench.race import MESH, Readings, Row, Subject, race
from bench.turns import by_wrk

_TITLE = "Workers"
_ENOUGH = 0.02
"""A process that takes this part of the CPU time is a worker; a supervisor takes none."""


def run(plan: Plan) -> Found:
    with (
        origin() as made,
        outbound(made, made.tls) as one,
        outbound(made, made.tls, {"MESH_WORKERS": "2"}) as two,
    ):
        if len(two.process.tree()) < 2:
            note = "This sidecar does not start workers (`MESH_WORKERS=2` made one process)."
            return Found(_TITLE, notes=[note])
        return Found(_TITLE, _race(made, one, two, plan))


def _race(made: Origin, one: Contestant, two: Contestant, plan: Plan) -> list[Row]:
    singles: list[float] = []
    speedups: list[float] = []

    def single() -> Readings:
        readings = by_wrk(one, made, "/", 64, plan.seconds(1.5)).turn()
        singles.append(readings["cpu_us"])
        return {"cpu_us": readings["cpu_us"]}

    def double() -> Readings:
        before = shares(two.process)
        readings = by_wrk(two, made, "/", 64, plan.seconds(1.5)).turn()
        after = shares(two.process)
        speedups.append(speedup(singles[-1], readings["cpu_us"], used(before, after)))
        return {"cpu_us": readings["cpu_us"]}

    rows = race(
        "small GET, 64 connections",
        [Subject("one worker", single), Subject("two workers", double)],
        plan.rounds,
    )
    measured = {MESH: speedups[-plan.rounds :]}  # the warm-up has one too
    return [*rows, Row("two workers, by their CPU and its parts", "speedup", measured)]


def shares(process: Process) -> dict[int, float]:
    """Give the CPU seconds of each of its processes so far."""
    return {pid: process.cpu_seconds_of(pid) for pid in process.tree()}


def used(before: dict[int, float], after: dict[int, float]) -> list[float]:
    """Give the CPU seconds that each worker took between two `shares`."""
    spent = [after[pid] - before.get(pid, 0.0) for pid in after]
    return [value for value in spent if value > _ENOUGH * sum(spent)]


def speedup(single: float, double: float, spent: list[float]) -> float:
    """Give the throughput of workers that took `spent` CPU seconds, relative to one's.

    `single` and `double` are CPU per request of one worker and of all of them.
    """
    return single / (double * max(spent) / sum(spent))

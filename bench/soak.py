"""`make soak`, or `python -m bench.soak`: a mesh of two apps under load, whose certificates renew.

Two sidecars as processes of their own, each with a simulated guest agent; between them the
simulator's gateway, and behind the second a backend. Exit status 1 where a request failed, a
connection was dropped, memory grew, files, threads or tasks piled up, or nothing was renewed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import http.client
import json
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import uvloop

from bench.process import Process, eventually
from bench.sidecar import sidecar
from bench.soak_client import Counts, Load
from dstack_mesh.sim.agent import GuestAgent
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Answer
from dstack_mesh.sim.world import World, WorldError

GROWTH = 1024.0
"""KB that one sidecar may gain in the second half of the run: the longer, the slower the leak."""

RISE = 10.0
"""Open files, threads or tasks more in the last quarter than in the second: they pile up."""

JUDGED_SECONDS = 60.0
"""A second half that is shorter tells nothing of memory: one page more would look like a leak."""

_EVERY = 5.0
_TELL_EVERY = 6
_ASIDE = 120.0
"""Seconds that start and end may take together."""

_RENEWALS = re.compile(
    r'^dstack_mesh_identity_renewals_total\{result="(\w+)"\} (\d+)', re.MULTILINE
)


@dataclass(frozen=True)
class Plan:
    seconds: float = 600.0
    lifetime: int = 30
    agent_fails: bool = False
    rate: float = 200.0


@dataclass(frozen=True)
class Sample:
    """What one sidecar has at a moment of the run."""

    seconds: float
    rss_kb: float
    files: int
    threads: int
    tasks: int


@dataclass
class Side:
    """One sidecar's samples, and the certificates that it fetched during the load."""

    samples: list[Sample] = field(default_factory=list)
    renewals: dict[str, int] = field(default_factory=dict)

    def slope(self) -> float:
        """Growth of memory over the second half, KB a minute, by least squares."""
        half = self._second_half()
        if len(half) < 2:
            return 0.0
        line = statistics.linear_regression(
            [sample.seconds / 60 for sample in half], [sample.rss_kb for sample in half]
        )
        return line.slope

    def grows(self) -> bool:
        """Tell whether memory grew, where there is time enough to tell."""
        half = self._second_half()
        seconds = half[-1].seconds - half[0].seconds
        return seconds >= JUDGED_SECONDS and self.slope() * seconds / 60 > GROWTH

    def rise(self, what: str) -> float:
        """Give by how much the usual number of files, threads or tasks is more at the end."""
        quarter = max(1, len(self.samples) // 4)
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        if not early:
            return 0.0
        return float(
            statistics.median(getattr(sample, what) for sample in late)
            - statistics.median(getattr(sample, what) for sample in early)
        )

    def _second_half(self) -> list[Sample]:
        return self.samples[len(self.samples) // 2 :]

    def summary(self) -> dict[str, object]:
        first, last = self.samples[0], self.samples[-1]
        return {
            "renewals": self.renewals,
            "rss_start_kb": round(first.rss_kb),
            "rss_end_kb": round(last.rss_kb),
            "rss_slope_kb_per_minute": round(self.slope(), 1),
            "files_start": first.files,
            "files_end": last.files,
            "threads_start": first.threads,
            "threads_end": last.threads,
            "tasks_start": first.tasks,
            "tasks_end": last.tasks,
            "tasks_most": max(sample.tasks for sample in self.samples),
        }


def problems(plan: Plan, counts: Counts, sides: dict[str, Side]) -> list[str]:
    """Say what must not be; nothing where the soak shows what it should."""
    found = []
    if counts.failures:
        found.append(f"{counts.failures} failures, the first: {counts.reasons[0]}")
    if counts.drops:
        found.append(f"{counts.drops} connections dropped")
    if not (counts.requests and counts.echoes and counts.events):
        found.append("a part of the load did nothing")
    for name, side in sides.items():
        if side.grows():
            found.append(f"memory of {name} grows by {side.slope():.0f} KB a minute")
        found += [
            f"{what} of {name} rise by {side.rise(what):.0f}"
            for what in ("files", "threads", "tasks")
            if side.rise(what) > RISE
        ]
        if plan.seconds > plan.lifetime and not side.renewals["ok"]:
            found.append(f"{name} renewed nothing: the run shows nothing")
        if plan.seconds > plan.lifetime and plan.agent_fails and not side.renewals["failed"]:
            found.append(f"no call of {name} to its agent failed")
    return found


def fail_every_second(agent: GuestAgent) -> None:
    """Let the second call for a certificate fail, and each second one after it."""
    usual, seen = agent.fault, 0

    async def fault() -> Answer | None:
        nonlocal seen
        calls = agent.calls["GetTlsKey"]
        is_new, seen = calls > seen, calls
        return agent.failure() if is_new and calls % 2 == 0 else await usual()

    agent.fault = fault  # type: ignore[method-assign]


async def soak(plan: Plan) -> tuple[Counts, dict[str, Side]]:
    """Run it. Raises `RuntimeError` where a sidecar does not start, or ends before its time."""
    async with asyncio.timeout(plan.seconds + _ASIDE), World(["a", "b"]) as world:
        if plan.agent_fails:
            for app in world.apps.values():
                fail_every_second(app.agent)
        async with _backend() as backend, contextlib.AsyncExitStack() as stack:
            common = {
                "MESH_CERT_LIFETIME": f"{plan.lifetime}s",
                "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
                "MESH_ADMIN_LISTEN": "127.0.0.1:0",
            }
            running = {}
            for name, more in (("b", {"MESH_BACKEND": backend}), ("a", {})):
                running[name] = await stack.enter_async_context(
                    _sidecar({**world.apps[name].env, **common, **more})
                )
            return await _loaded(plan, running, world.apps["b"].app_id)


async def _loaded(
    plan: Plan, running: dict[str, Process], app_id: str
) -> tuple[Counts, dict[str, Side]]:
    before = {name: await asyncio.to_thread(_renewals, one) for name, one in running.items()}
    load = Load(running["a"].bound["outbound"], app_id, rate=plan.rate)
    sides = {name: Side() for name in running}
    async with asyncio.TaskGroup() as group:
        sampling = group.create_task(_sample(plan, running, sides, load.counts))
        await load.run(plan.seconds)
        sampling.cancel()
    await _take(time.monotonic(), running, sides)
    for name, one in running.items():
        after = await asyncio.to_thread(_renewals, one)
        sides[name].renewals = {result: after[result] - before[name][result] for result in after}
    return load.counts, sides


async def _sample(
    plan: Plan, running: dict[str, Process], sides: dict[str, Side], counts: Counts
) -> None:
    pause = min(_EVERY, plan.seconds / 10)
    begin = time.monotonic()
    while True:
        for _ in range(_TELL_EVERY):
            await asyncio.sleep(pause)
            await _take(time.monotonic(), running, sides)
        memory = ", ".join(
            f"{name} {side.samples[-1].rss_kb:.0f} KB" for name, side in sides.items()
        )
        print(
            f"{time.monotonic() - begin:.0f} s: {counts.requests} requests,"
            f" {counts.failures} failures, {counts.drops} drops; {memory}",
            file=sys.stderr,
        )


async def _take(now: float, running: dict[str, Process], sides: dict[str, Side]) -> None:
    for name, one in running.items():
        try:
            tasks = json.loads((await asyncio.to_thread(_asked, one, "/status"))[1])["tasks"]
            sample = Sample(now, one.rss_mb() * 1024, one.open_files(), one.threads(), tasks)
        except (OSError, LookupError, http.client.HTTPException):
            raise RuntimeError(f"the sidecar of {name} ended in the middle of the run") from None
        sides[name].samples.append(sample)


@contextlib.asynccontextmanager
async def _backend() -> AsyncIterator[str]:
    backend = Backend()
    try:
        yield str(await backend.start())
    finally:
        await backend.aclose()


@contextlib.asynccontextmanager
async def _sidecar(env: dict[str, str]) -> AsyncIterator[Process]:
    """Start and stop it in a thread: what it waits for meanwhile is served by this loop."""
    manager = sidecar(env)
    process = await asyncio.to_thread(manager.__enter__)
    try:
        failure = "the sidecar did not get ready"
        await asyncio.to_thread(
            eventually, lambda: _asked(process, "/readyz")[0] == 200, 20, failure
        )
        yield process
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


def _asked(process: Process, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(process.bound["admin"], timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def _renewals(process: Process) -> dict[str, int]:
    found = {
        result: int(count) for result, count in _RENEWALS.findall(_asked(process, "/metrics")[1])
    }
    return {"ok": 0, "failed": 0} | found


def main(arguments: Sequence[str] | None = None) -> int:
    """Give the exit status: 0 all as it should be, 1 not."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description=__doc__,
        epilog="BENCH_PYTHON is the interpreter that runs the sidecars (default: this one).",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="default %(default)s")
    parser.add_argument(
        "--lifetime", type=int, default=30, help="of a certificate, seconds (default %(default)s)"
    )
    parser.add_argument(
        "--agent-fails", action="store_true", help="every second call for a certificate fails"
    )
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    plan = Plan(options.minutes * 60, options.lifetime, options.agent_fails, options.rate)
    try:
        counts, sides = uvloop.run(soak(plan))
    except (RuntimeError, OSError, WorldError, ExceptionGroup) as error:
        inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        print(f"error: {inner!r}", file=sys.stderr)
        return 1
    _report(plan, counts, sides, as_json=options.json)
    return 1 if problems(plan, counts, sides) else 0


def _report(plan: Plan, counts: Counts, sides: dict[str, Side], *, as_json: bool) -> None:
    result = dataclasses.asdict(plan) | dataclasses.asdict(counts)
    result["slowest_ms"] = round(counts.slowest_ms, 1)
    result["sidecars"] = {name: side.summary() for name, side in sides.items()}
    result["problems"] = problems(plan, counts, sides)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for name, side in result.pop("sidecars").items():
        result |= {f"{name}: {key}": value for key, value in side.items()}
    for key, value in result.items():
        print(f"{key:<28} {value}")


if __name__ == "__main__":
    sys.exit(main())

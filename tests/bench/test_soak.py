from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from bench.soak import Plan, Sample, Side, fail_every_second, problems
from bench.soak_client import Counts, Load

from dstack_mesh.dstack.agent import AgentClient, AgentError
from dstack_mesh.model import UnixAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Answer, Request, Response
from dstack_mesh.sim.world import World
from tests.integration.harness import eventually

ROOT = Path(__file__).parents[2]


def test_a_mesh_under_load_renews_and_loses_nothing() -> None:
    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.2", "--lifetime", "3", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)

    assert done.returncode == 0, (done.stdout, done.stderr)
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert (result["failures"], result["drops"]) == (0, 0)
    assert result["requests"] > 1_000
    assert min(result["echoes"], result["events"]) > 10
    for side in result["sidecars"].values():
        assert side["renewals"]["ok"] >= 3
        assert side["rss_end_kb"] > 10_000
        assert 10 < side["files_end"] < 100
        assert 2 < side["tasks_end"] <= side["tasks_most"] < 50


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    """A backend that is asked without a mesh between."""
    backend = Backend()
    yield backend
    await backend.aclose()


async def load(backend: Backend, meanwhile: Callable[[], object] = lambda: None) -> Counts:
    one = Load(str(await backend.start()), "00" * 20, rate=100, patience=1)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(one.run(1.5))
        await eventually(
            lambda: one.counts.requests >= 30 and one.counts.echoes > 0 and one.counts.events > 0
        )
        meanwhile()
    return running.result()


async def test_a_good_server_fails_nothing(backend: Backend) -> None:
    counts = await load(backend)

    assert (counts.failures, counts.drops, counts.closed, counts.reasons) == (0, 0, 0, [])
    assert backend.connections == 10
    assert {request.method for request in backend.requests} == {"GET", "POST"}


async def test_a_wrong_answer_is_a_failure_and_no_drop(backend: Backend) -> None:
    counts = await load(backend, lambda: backend.fail_next(3))

    assert (counts.failures, counts.drops) == (3, 0)
    assert "simulated failure" in counts.reasons[0]


async def test_each_connection_that_ends_is_a_drop(backend: Backend) -> None:
    counts = await load(backend, backend.drop_connections)

    assert (counts.failures, counts.drops) == (10, 10)
    assert backend.connections == 20, "the load goes on"


async def test_an_announced_end_is_no_drop(backend: Backend) -> None:
    async def last(_: Request) -> Answer:
        return Response(200, [("connection", "close")], b"hello\n")

    counts = await load(backend, lambda: backend.on("/", last))

    assert (counts.failures, counts.drops) == (0, 0)
    assert counts.closed > 8


async def test_no_answer_in_time_is_a_failure(backend: Backend) -> None:
    def stall() -> None:
        backend.delay = 60

    counts = await load(backend, stall)

    assert counts.failures >= 8
    assert counts.drops == 0
    assert "TimeoutError" in counts.reasons[0]


async def test_every_second_call_for_a_certificate_fails_and_no_other(tmp_path: Path) -> None:
    async with World(["a"], tmp_path) as world:
        app = world.apps["a"]
        fail_every_second(app.agent)
        client = AgentClient(UnixAddress(str(app.directory / "dstack.sock")))
        for _ in range(3):
            await client.get_tls_key(subject="a", not_after=int(time.time()) + 60)
            await client.info()
            with pytest.raises(AgentError, match="simulated failure"):
                await client.get_tls_key(subject="a", not_after=int(time.time()) + 60)
            await client.info()
        await client.aclose()


def side(kb_a_minute: float, minutes: float = 10, piling: float = 0) -> Side:
    """Memory that rises fast, and after a third of the time by so much.

    `piling`: files and tasks more in each of 120 samples.
    """
    samples = []
    for number in range(121):
        seconds = number / 120 * minutes * 60
        after = max(0.0, seconds / 60 - minutes / 3)
        rss = 40_000 + 100 * min(number, 40) + after * kb_a_minute
        more = round(number * piling)
        samples.append(Sample(seconds, rss, 20 + more, 5, 4 + more))
    return Side(samples, {"ok": 9, "failed": 9})


def test_the_slope_is_of_the_second_half() -> None:
    assert side(300).slope() == pytest.approx(300)
    assert side(0).slope() == pytest.approx(0)


FINE = Counts(requests=1_000, echoes=9, events=9)
BAD = Counts(requests=1_000, failures=2, drops=1, echoes=9, events=9, reasons=["GET: why"])


@pytest.mark.parametrize(
    ("counts", "one", "said"),
    [
        (FINE, side(200), []),
        (FINE, side(210), ["memory of a grows by 210 KB a minute"]),
        (FINE, side(60, minutes=30), []),
        (FINE, side(70, minutes=30), ["memory of a grows by 70 KB a minute"]),
        (FINE, side(9_000, minutes=1), []),
        (FINE, side(0, piling=0.1), []),
        (FINE, side(0, piling=0.2), ["files of a rise by 12", "tasks of a rise by 12"]),
        (BAD, side(0), ["2 failures, the first: GET: why", "1 connections dropped"]),
        (Counts(requests=1_000, echoes=9), side(0), ["a part of the load did nothing"]),
        (
            FINE,
            Side(side(0).samples, {"ok": 0, "failed": 0}),
            ["a renewed nothing: the run shows nothing", "no call of a to its agent failed"],
        ),
    ],
)
def test_the_verdict(counts: Counts, one: Side, said: list[str]) -> None:
    assert problems(Plan(agent_fails=True), counts, {"a": one}) == said

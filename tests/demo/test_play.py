from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess

import pytest

from dstack_mesh.demo.act import Act, Outcome, Result
from dstack_mesh.demo.play import PARTS, Demo, suggestions
from dstack_mesh.demo.stage import Stage, StageError
from tests.demo.fakes import FakeStage


class Log:
    """A display that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.stage: Stage | None = None
        self.kept = asyncio.Event()

    def begin(self, stage: Stage) -> None:
        self.stage = stage
        self.told.append("begin")

    def playing(self, act: Act) -> None:
        self.told.append(act.name)

    def played(self, result: Result) -> None:
        self.told.append(result.outcome.ok)

    def end(self, seconds: float) -> None:
        self.told.append("end")

    def keep(self, stage: Stage) -> None:
        self.told.append("keep")
        self.kept.set()


def acts(*outcomes: bool) -> dict[str, list[Act]]:
    def make(number: int, ok: bool) -> Act:
        async def run(_: Stage) -> Outcome:
            return Outcome(ok, "")

        return Act(f"act_{number}", "", "", run)

    return {"part": [make(number, ok) for number, ok in enumerate(outcomes)]}


@pytest.mark.parametrize("ok", [True, False])
async def test_all_acts_are_played_in_their_order(ok: bool) -> None:
    log = Log()
    demo = Demo(log, keep=False, parts=acts(True, ok))
    assert not demo.ok
    await demo.run()
    assert log.told == ["begin", "act_0", True, "act_1", ok, "end"]
    assert demo.ok is ok
    assert demo.complete


async def test_kept_demo_ends_when_it_is_cancelled() -> None:
    log = Log()
    demo = Demo(log, keep=True, parts=acts(True))
    task = asyncio.create_task(demo.run())
    await asyncio.wait_for(log.kept.wait(), 20)
    assert log.told[-1] == "keep"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert demo.ok
    assert log.stage is not None
    assert all(sidecar.ended is not None for sidecar in log.stage.sidecars)


async def test_kept_demo_ends_with_a_sidecar() -> None:
    log = Log()
    task = asyncio.create_task(Demo(log, keep=True, parts=acts(True)).run())
    await asyncio.wait_for(log.kept.wait(), 20)
    assert log.stage is not None
    os.kill(log.stage.caller.pid, signal.SIGKILL)
    with pytest.raises(StageError, match="shop's sidecar ended by signal 9"):
        await asyncio.wait_for(task, 20)


def test_acts_have_names_of_their_own() -> None:
    names = [act.name for parts in PARTS.values() for act in parts]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)


def test_suggestions_hold_the_pair_that_users_know() -> None:
    lines = [line for _, line in suggestions(FakeStage())]
    assert lines[0] == "APP_ID=$(curl -s http://127.0.0.1:2001/info | jq -r .app_id)"
    assert lines[1].startswith('curl -s -H "x-dstack-target-app: $APP_ID" http://127.0.0.1:1001/')


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq")), reason="curl and jq are not both there"
)
async def test_suggestions_work_as_they_are() -> None:
    async with Stage() as stage:
        stage.lead_astray(stage.other_app_id, stage.target_app.host)
        lines = [line for _, line in suggestions(stage) if not line.startswith("tail")]
        script = "\n".join(["set -eu", *lines]).replace("n=10&seconds=0.5", "n=2")
        ran = await asyncio.to_thread(
            subprocess.run, ["bash", "-c", script], capture_output=True, text=True, timeout=30
        )
        assert ran.returncode == 0, ran.stderr
        for part in (
            stage.caller_app.app_id,
            "data: event 2 of 2",
            "x-dstack-mesh-error: peer_app_id_mismatch",
            '"ready":true',
            "dstack_mesh_requests_total",
        ):
            assert part in ran.stdout

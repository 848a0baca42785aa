"""Each act is good on a good mesh, and says so when what it watches for goes wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dstack_mesh.demo import served
from dstack_mesh.demo.act import Act, Result, play
from dstack_mesh.demo.sidecar import Memory, Sidecar
from dstack_mesh.demo.stage import Stage
from dstack_mesh.model import AppId
from dstack_mesh.sim.messages import Answer, Request, Response

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACTS = {act.name: act for act in served.ACTS}


async def failed(name: str, stage: Stage) -> str:
    result = await play(ACTS[name], stage)
    assert not result.outcome.ok
    return result.outcome.happened


@pytest.mark.parametrize("act", served.ACTS, ids=lambda act: act.name)
async def test_it_goes_well(stage: Stage, act: Act) -> None:
    result: Result = await play(act, stage)
    assert result.outcome.ok, result.outcome.happened
    assert result.outcome.happened.startswith(("200", "4 events"))


async def test_upload_tells_size_and_memory(stage: Stage) -> None:
    happened = (await play(ACTS["upload"], stage)).outcome.happened
    assert happened.startswith("200, 50 MB arrived intact in ")
    assert "shop's" in happened
    assert "billing's" in happened


async def test_agent_of_another_app_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = stage.caller_app.agent
    monkeypatch.setattr(agent, "info", replace(agent.info, app_id=AppId("e" * 40)))
    assert await failed("guest_agent", stage) == "200, app_id is eeeeeeee…eeee"
    monkeypatch.setattr(agent, "failing", True)
    assert await failed("guest_agent", stage) == "400, app_id is missing"


@pytest.mark.parametrize("name", ["call", "forged_caller"])
@pytest.mark.parametrize("forged", ["X-Dstack-App-Id", "x_dstack_app_id"])
async def test_backend_that_is_told_something_else_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str, forged: str
) -> None:
    echo = stage.backend._handlers["/echo"]

    async def twice(request: Request) -> Answer:
        request.headers.append((forged, "f" * 40))
        return await echo(request)

    monkeypatch.setitem(stage.backend._handlers, "/echo", twice)
    assert "ffffffff…ffff" in await failed(name, stage)


async def test_backend_that_is_told_nothing_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def error(_: Request) -> Answer:
        return Response(500)

    monkeypatch.setitem(stage.backend._handlers, "/echo", error)
    assert "500" in await failed("call", stage)


async def test_upload_that_changes_on_its_way_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def other(request: Request) -> Answer:
        await request.read()
        return Response(200, [], b'{"bytes": 7, "sha256": "00"}')

    monkeypatch.setitem(stage.backend._handlers, "/upload", other)
    assert await failed("upload", stage)
    assert "arrived changed" in await failed("upload", stage)


async def test_memory_that_grows_is_noticed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sidecar, "memory", lambda _: Memory(40_000_000, 60_000_000))
    assert "shop's 40.0 → 60.0 MB" in await failed("upload", stage)


async def test_events_that_are_held_back_are_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "EVENT_DELAY_LIMIT", 0.0)
    assert (await failed("event_stream", stage)).startswith("4 events\nthe slowest ")


async def test_events_that_are_lost_are_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_lines(*_: object) -> object:
        for line in ["data: 0", ""]:
            yield line

    monkeypatch.setattr(served.client, "lines", no_lines)
    assert (await failed("event_stream", stage)).startswith("1 events")

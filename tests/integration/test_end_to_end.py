"""Two apps talk through two sidecars: the main job."""

from __future__ import annotations

import json

from tests.integration.harness import Mesh


async def test_the_backend_sees_the_verified_caller(pair: Mesh) -> None:
    answer = await pair.call("a", "b", path="/echo?x=1")
    assert answer.status == 200
    seen = json.loads(answer.body)
    assert seen["target"] == "/echo?x=1"
    assert ["x-dstack-app-id", pair.app_id("a")] in seen["headers"]


async def test_agent_calls_go_to_the_guest_agent(pair: Mesh) -> None:
    answer = await pair.call("a", None, path="/info")
    assert json.loads(answer.body)["app_id"] == pair.app_id("a")

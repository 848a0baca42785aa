from __future__ import annotations

from dstack_mesh.check.result import all_well
from dstack_mesh.check.whole import check
from dstack_mesh.model import Target
from tests.check.conftest import loaded, statuses
from tests.integration.harness import Mesh


async def test_all_in_their_order(one: Mesh) -> None:
    await one.start("b")
    settings = loaded(one, "a")
    target = Target(one.app_id("b"), settings.settings.outbound.default_port)
    groups = await check(settings, target)
    assert [group.name for group in groups] == [
        "settings",
        "guest agent",
        "identity",
        "gateway",
        "listeners",
        "sidecar",
        "backend",
        "limits",
        f"target {one.app_id('b')}",
    ]
    assert all_well(groups)
    assert statuses(groups[-1]) == ["ok"] * 7
    assert len(await check(settings, None)) == 8


async def test_one_failure_does_not_keep_the_rest_from_being_looked_at(one: Mesh) -> None:
    one.app("a").agent.failing = True
    groups = await check(loaded(one, "a"), None)
    assert not all_well(groups)
    assert statuses(groups[3]) == ["ok"] * 3

"""Requests of the application: client -> sidecar -> nginx as a target with mutual TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.differential.account import Ledger
from tests.differential.nginx import Certificates, nginx
from tests.differential.stage import Stage
from tests.differential.tap import Tap
from tests.http.corpus import requests
from tests.integration.harness import Mesh
from tests.integration.tls_peers import new_app_id

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = [row for row in requests() if not row.name.endswith("@in")]
RULES = list(dict.fromkeys(row.rule for row in ROWS))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(one: Mesh, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    app_id, kms = new_app_id(), one.world.kms
    shown = Certificates(kms.issue(app_id), kms.root_pem)
    async with (
        nginx(tmp_path_factory.mktemp("nginx"), shown) as peer,
        Tap(peer.address).running() as tap,
    ):
        one.world.gateway.add_route(app_id, tap.address.host, tap.address.port)
        # Whatever is not for the target must not be for anybody who would answer it.
        sidecar = await one.start("a", backend=False, MESH_AGENT_EXPOSE="none")
        ledger = Ledger(sidecar, "outbound")
        async with Stage(one.outbound("a"), ledger, tap, peer, app_id=app_id).running() as running:
            yield running
        await sidecar.stop()


@pytest.mark.parametrize("rule", RULES)
async def test_the_target_reads_what_the_mesh_meant(stage: Stage, rule: str) -> None:
    problems: list[str] = []
    for row in ROWS:
        if row.rule == rule:
            problems += await stage.run(row)
    assert not problems, "\n".join(problems)

"""Requests from another app: caller -> sidecar -> nginx, HAProxy and h11 as its backend."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.differential.account import Ledger
from tests.differential.h11_peer import H11Server
from tests.differential.haproxy import haproxy
from tests.differential.nginx import nginx
from tests.differential.stage import Peer, Stage
from tests.differential.tap import Tap
from tests.http.corpus import requests
from tests.integration.harness import Mesh
from tests.integration.tls_peers import caller_context

pytestmark = pytest.mark.asyncio(loop_scope="module")


ROWS = [row for row in requests() if not row.name.endswith("@out")]
RULES = list(dict.fromkeys(row.rule for row in ROWS))


def make(peer: str, directory: Path) -> contextlib.AbstractAsyncContextManager[Peer]:
    """Make the named peer; it runs as long as the context is open."""
    if peer == "nginx":
        return nginx(directory)
    return haproxy(directory) if peer == "haproxy" else H11Server().running()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["nginx", "haproxy", "h11"])
async def stage(
    request: pytest.FixtureRequest, one: Mesh, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stage]:
    directory = tmp_path_factory.mktemp(request.param)
    async with contextlib.AsyncExitStack() as stack:
        peer = await stack.enter_async_context(make(request.param, directory))
        tap = await stack.enter_async_context(Tap(peer.address).running())
        sidecar = await one.start("b", MESH_BACKEND=str(tap.address))
        stack.push_async_callback(sidecar.stop)
        tls = caller_context(one.world.kms.root_pem, one.world.kms.issue(one.app_id("a")))
        inbound = Stage(one.inbound("b"), Ledger(sidecar, "inbound"), tap, peer, tls)
        yield await stack.enter_async_context(inbound.running())


@pytest.mark.parametrize("rule", RULES)
async def test_the_peer_reads_what_the_mesh_meant(stage: Stage, rule: str) -> None:
    problems: list[str] = []
    for row in ROWS:
        if row.rule == rule:
            problems += await stage.run(row)
    assert not problems, "\n".join(problems)

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dstack_mesh.check import identity
from dstack_mesh.check.identity import IdentityChecks
from dstack_mesh.identity.source import LOCAL_KEY_PROVIDER
from dstack_mesh.sim.kms import Kms
from tests.check.conftest import loaded, named, statuses
from tests.integration.harness import Mesh
from tests.integration.test_identity_sources import Files
from tests.integration.tls_peers import new_app_id

ISSUES = "it issues a certificate with an app-id"


async def test_an_agent_that_does_all_it_should(one: Mesh) -> None:
    checks = IdentityChecks(loaded(one, "a").settings)
    agent = await checks.agent()
    assert statuses(agent) == ["ok"] * 3
    assert [result.detail for result in agent.results] == [
        one.app("a").env["DSTACK_AGENT_ADDRESS"],
        "0.6.0",
        f"app {one.app_id('a')}",
    ]
    assert statuses(await checks.identity()) == ["ok"] * 3
    assert checks.snapshot is not None
    assert checks.snapshot.not_after < time.time() + 700, "it is thrown away soon"


async def test_an_absent_agent(one: Mesh, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/none.sock"
    checks = IdentityChecks(loaded(one, "a", DSTACK_AGENT_ADDRESS=address).settings)
    agent = await checks.agent()
    assert statuses(agent) == ["failed", "skipped", "skipped"]
    assert "is its socket mounted into this container?" in agent.results[0].detail
    assert "DSTACK_AGENT_ADDRESS" in agent.results[0].remedy
    assert statuses(await checks.identity()) == ["skipped", "skipped", "ok"]
    assert checks.snapshot is None


async def test_a_machine_without_app_id_is_told_in_those_words(one: Mesh) -> None:
    one.app("a").agent.local_key_provider = True
    checks = IdentityChecks(loaded(one, "a").settings)
    found = named(await checks.agent(), ISSUES)
    assert (found.status, found.detail) == ("failed", LOCAL_KEY_PROVIDER)


async def test_an_older_agent_does_not_tell_its_version(one: Mesh) -> None:
    one.app("a").agent.fail_next(1)
    checks = IdentityChecks(loaded(one, "a").settings)
    assert statuses(await checks.agent()) == ["failed", "skipped", "skipped"]
    assert statuses(await checks.agent()) == ["ok"] * 3, "the next round asks anew"


async def test_files_do_without_an_agent(one: Mesh, tmp_path: Path) -> None:
    files = Files(tmp_path)
    kms = one.world.kms
    files.write(kms.issue(one.app_id("a")), kms.root_pem)
    nowhere = f"unix:{tmp_path}/none.sock"
    settings = loaded(one, "a", DSTACK_AGENT_ADDRESS=nowhere, **files.env).settings
    checks = IdentityChecks(settings)
    assert statuses(await checks.agent()) == ["warning"]
    assert statuses(await checks.identity()) == ["ok"] * 3
    assert checks.snapshot is not None
    assert checks.snapshot.app_id == one.app_id("a")

    present = IdentityChecks(loaded(one, "a", **files.env).settings)
    assert statuses(await present.agent()) == ["ok", "ok", "skipped"]
    assert not one.app("a").agent.calls["GetTlsKey"], "its key is not wanted"


async def test_files_that_end_soon(one: Mesh, tmp_path: Path) -> None:
    files = Files(tmp_path)
    kms = one.world.kms
    files.write(kms.issue(one.app_id("a"), not_after=int(time.time()) + 600), kms.root_pem)
    checks = IdentityChecks(loaded(one, "a", **files.env).settings)
    assert statuses(await checks.identity()) == ["ok", "warning", "ok"]
    later = IdentityChecks(loaded(one, "a", **files.env).settings, lambda: time.time() + 700)
    assert statuses(await later.identity()) == ["failed", "skipped", "ok"]


async def test_files_that_do_not_hold(one: Mesh, tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write(one.world.kms.issue(new_app_id()), Kms.create().root_pem)
    checks = IdentityChecks(loaded(one, "a", **files.env).settings)
    chain, *_ = (await checks.identity()).results
    assert (chain.status, chain.name) == ("failed", "our chain holds")
    assert "would be refused by every peer" in chain.detail
    assert checks.snapshot is None


@pytest.mark.parametrize(("now", "status"), [(0.0, "failed"), (identity.EARLIEST + 1, "ok")])
async def test_a_clock_that_was_never_set(one: Mesh, now: float, status: str) -> None:
    checks = IdentityChecks(loaded(one, "a").settings, lambda: now)
    clock = named(await checks.identity(), "the clock is sane")
    assert clock.status == status
    assert clock.detail.startswith("it shows 1970-01-01" if now == 0 else "2026-01-01")

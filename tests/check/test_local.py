from __future__ import annotations

import asyncio
import resource
import socket
import time
from pathlib import Path

import pytest

from dstack_mesh.check import local
from dstack_mesh.check.identity import IdentityChecks
from dstack_mesh.check.local import LocalChecks, settings_group
from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.settings.load import Loaded, load_settings
from tests.check.conftest import loaded, named, statuses
from tests.integration.harness import Mesh, answers, origin

READY, RENEWED = "the sidecar is ready", "its certificate is renewed in time"


async def snapshot(one: Mesh, name: str) -> Snapshot:
    checks = IdentityChecks(loaded(one, name).settings)
    await checks.agent()
    assert checks.snapshot is not None
    return checks.snapshot


def of(one: Mesh, name: str) -> Loaded:
    """Give the settings that the running sidecar of app `name` would have without free ports."""
    bound = one.sidecars[name].bound()
    environ = {f"MESH_{key.upper()}_LISTEN": value for key, value in bound.items() if value}
    return loaded(
        one, name, **environ, MESH_BACKEND=str(one.sidecars[name].settings.inbound.backend)
    )


def test_settings() -> None:
    group = settings_group(load_settings({}, {"MESH_BACKND": "x"}, None))
    assert statuses(group) == ["ok", "warning"]
    assert group.results[0].detail.startswith("0 given")
    assert "the nearest known is MESH_BACKEND" in group.results[1].detail


async def test_before_a_sidecar_runs_its_addresses_are_free(one: Mesh, tmp_path: Path) -> None:
    sock = f"unix:{tmp_path}/admin.sock"
    settings = loaded(one, "a", MESH_BACKEND="127.0.0.1:1", MESH_ADMIN_LISTEN=sock).settings
    checks = LocalChecks(settings, None)
    group = await checks.listeners()
    assert statuses(group) == ["ok"] * 3
    assert all(one.detail.endswith(" is free") for one in group.results)
    assert not (tmp_path / "admin.sock").exists()
    assert statuses(await checks.sidecar()) == ["warning", "skipped"]
    assert statuses(await checks.backend()) == ["failed"]


async def test_a_running_sidecar_is_known_as_ours(one: Mesh) -> None:
    await one.start("a")
    settings = of(one, "a").settings
    checks = LocalChecks(settings, await snapshot(one, "a"))
    group = await checks.listeners()
    assert [(one.status, one.detail.partition(": ")[2]) for one in group.results] == [
        ("ok", "our mesh has it")
    ] * 3
    sidecar = await checks.sidecar()
    assert statuses(sidecar) == ["ok", "ok"]
    assert f"app {one.app_id('a')}" in sidecar.results[0].detail
    assert statuses(await checks.backend()) == ["ok"]


async def test_inbound_of_another_app_is_not_ours(one: Mesh) -> None:
    await one.start("a")
    settings = of(one, "a").settings
    for who, status in ((await snapshot(one, "b"), "failed"), (None, "warning")):
        group = await LocalChecks(settings, who).listeners()
        assert named(group, "inbound can listen").status == status


async def test_another_program_has_the_addresses(one: Mesh) -> None:
    async with (
        origin(answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")) as (_, web),
        origin(answers(b"SSH-2.0-x\r\n")) as (_, ssh),
    ):
        settings = loaded(
            one, "a", MESH_OUTBOUND_LISTEN=str(web), MESH_ADMIN_LISTEN=str(ssh)
        ).settings
        group = await LocalChecks(settings, None).listeners()
        assert statuses(group) == ["failed", "failed", "skipped"]
        assert group.results[0].detail == f"another program listens on {web}"
        assert "MESH_OUTBOUND_LISTEN" in group.results[0].remedy
        assert statuses(await LocalChecks(settings, None).sidecar()) == ["failed", "skipped"]


async def test_an_address_that_cannot_be_had(one: Mesh) -> None:
    settings = loaded(one, "a", MESH_OUTBOUND_LISTEN="unix:/nowhere/x.sock").settings
    group = await LocalChecks(settings, None).listeners()
    assert named(group, "outbound can listen").status == "failed"
    assert "its directory does not exist" in group.results[0].detail


async def test_nginx_mode_has_the_auth_service(one: Mesh) -> None:
    await one.start("a", MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN="127.0.0.1:0")
    auth = str(one.sidecars["a"].bound()["auth"])
    settings = loaded(one, "a", MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN=auth).settings
    group = await LocalChecks(settings, None).listeners()
    assert named(group, "auth can listen").detail == f"{auth}: our mesh has it"


async def test_what_is_off_or_any_port_is_not_looked_at(one: Mesh) -> None:
    environ = {"MESH_ADMIN_LISTEN": "off", "MESH_OUTBOUND_LISTEN": "127.0.0.1:0"}
    checks = LocalChecks(loaded(one, "a", **environ, MESH_INBOUND_MODE="off").settings, None)
    assert statuses(await checks.listeners()) == ["ok", "skipped", "skipped"]
    assert statuses(await checks.sidecar()) == ["skipped", "skipped"]
    assert statuses(await checks.backend()) == ["skipped"]


async def test_a_sidecar_that_is_not_ready_says_why(one: Mesh) -> None:
    one.app("a").agent.failing = True
    await one.start_closed("a", MESH_ADMIN_LISTEN="127.0.0.1:0", MESH_OUTBOUND_LISTEN="127.0.0.1:0")
    address = str(one.sidecars["a"].bound()["admin"])
    group = await LocalChecks(loaded(one, "a", MESH_ADMIN_LISTEN=address).settings, None).sidecar()
    assert statuses(group) == ["failed", "skipped"]
    assert "this mesh has no certificate yet" in group.results[0].detail


@pytest.mark.parametrize(("hours", "status"), [(1, "ok"), (23, "warning"), (25, "failed")])
async def test_a_renewal_that_is_late(one: Mesh, hours: float, status: str) -> None:
    await one.start("a")
    checks = LocalChecks(of(one, "a").settings, None, lambda: time.time() + hours * 3600)
    assert named(await checks.sidecar(), RENEWED).status == status


async def test_a_sidecar_that_stands_still(one: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = loaded(one, "a", MESH_ADMIN_LISTEN=address).settings
        group = await asyncio.wait_for(LocalChecks(settings, None).sidecar(), 10)
    assert group.results[0].detail == f"{address}: no answer within 0.2 s"


@pytest.mark.parametrize(("connections", "status"), [("5", "ok"), ("999999999", "warning")])
async def test_open_files(one: Mesh, connections: str, status: str) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] == resource.RLIM_INFINITY:
        pytest.skip("there is no limit on this machine")
    settings = loaded(one, "a", MESH_MAX_CONNECTIONS=connections).settings
    assert statuses(LocalChecks(settings, None).files()) == [status]

from __future__ import annotations

import json
import socket
from pathlib import Path

from dstack_mesh.check.gateway import GatewayChecks, connects, resolves
from dstack_mesh.model import TcpAddress
from tests.check.conftest import loaded, statuses
from tests.integration.harness import Mesh


async def test_a_gateway_that_is_there(one: Mesh) -> None:
    checks = GatewayChecks(loaded(one, "a").settings)
    group = await checks.run(one.app_id("a"))
    assert statuses(group) == ["ok"] * 3
    assert one.world.gateway.info_url in group.results[0].detail
    assert checks.gateway is not None


async def test_it_is_known_by_the_setting(one: Mesh) -> None:
    environ = {"MESH_GATEWAY": "gw.example.com", "MESH_SYS_CONFIG": "/nowhere"}
    checks = GatewayChecks(loaded(one, "a", **environ).settings)
    group = await checks.run(None)
    assert statuses(group) == ["ok"] * 3, "MESH_GATEWAY_CONNECT needs no name"
    assert group.results[0].detail == "gw.example.com (MESH_GATEWAY)"


async def test_no_file_names_it(one: Mesh) -> None:
    group = await GatewayChecks(loaded(one, "a", MESH_SYS_CONFIG="/nowhere").settings).run(None)
    assert statuses(group) == ["failed", "skipped", "skipped"]
    assert "/nowhere" in group.results[0].detail


async def test_no_gateway_answers_and_credentials_are_not_shown(one: Mesh, tmp_path: Path) -> None:
    config = tmp_path / "sys.json"
    urls = ["https://me:secret@127.0.0.1:1", "http://127.0.0.1:1"]
    config.write_text(json.dumps({"gateway_urls": urls}))
    group = await GatewayChecks(loaded(one, "a", MESH_SYS_CONFIG=str(config)).settings).run(None)
    known = group.results[0]
    assert known.status == "failed"
    assert "http://127.0.0.1:1: " in known.detail
    assert "secret" not in known.detail


async def test_a_domain_that_leaves_no_room(one: Mesh) -> None:
    base = ".".join(["a" * 53, *["a" * 51] * 3])  # room for a port of one digit
    group = await GatewayChecks(loaded(one, "a", MESH_GATEWAY=base).settings).run(one.app_id("a"))
    assert statuses(group) == ["ok", "failed"]
    assert "is not a valid host name" in group.results[1].detail


async def test_outbound_is_off(one: Mesh) -> None:
    group = await GatewayChecks(loaded(one, "a", MESH_OUTBOUND_LISTEN="off").settings).run(None)
    assert statuses(group) == ["skipped"]


async def test_a_name_that_does_not_resolve() -> None:
    found = await resolves(TcpAddress("name.invalid", 1))
    assert (found.status, found.detail[:14]) == ("failed", "name.invalid: ")
    assert "does not resolve" in found.detail


async def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        where = TcpAddress("127.0.0.1", taken.getsockname()[1])
        found = await connects(where, 5)
    assert (found.status, found.detail) == ("failed", f"{where}: Connection refused")

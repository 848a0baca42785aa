"""The way to a target ends at each of its steps, for a real reason."""

from __future__ import annotations

import asyncio
import socket

from dstack_mesh.check.gateway import GatewayChecks
from dstack_mesh.check.identity import IdentityChecks
from dstack_mesh.check.result import Group
from dstack_mesh.check.target import (
    APP_ID,
    CHAIN,
    CONNECTS,
    HEALTH,
    NAME,
    RESOLVES,
    STEPS,
    TLS,
    check_target,
)
from dstack_mesh.model import AppId, Target
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.kms import Kms
from tests.check.conftest import loaded
from tests.integration.harness import Mesh
from tests.integration.tls_peers import any_answer, new_app_id


async def walk(one: Mesh, app_id: AppId, **environ: str) -> Group:
    settings = loaded(one, "a", **environ).settings
    identity, gateway = IdentityChecks(settings), GatewayChecks(settings)
    await identity.agent()
    await identity.identity()
    await gateway.run(None)
    target = Target(app_id, settings.outbound.default_port)
    return await asyncio.wait_for(
        check_target(target, settings, identity.snapshot, gateway.gateway), 20
    )


def ends_at(group: Group, step: str) -> str:
    """Hold the whole to its end at `step`; give that result's detail and remedy."""
    at = STEPS.index(step)
    assert [one.name for one in group.results] == list(STEPS)
    expected = ["ok"] * at + ["failed"] + ["skipped"] * (len(STEPS) - at - 1)
    assert [one.status for one in group.results] == expected, group
    found = group.results[at]
    return f"{found.detail} -> {found.remedy}"


async def test_the_whole_way(one: Mesh) -> None:
    await one.start("b")
    group = await walk(one, one.app_id("b"))
    assert [(one.name, one.status) for one in group.results] == [(step, "ok") for step in STEPS]
    assert not one.backends["b"].requests, "the mesh answers for itself"


async def test_no_identity_or_no_gateway(one: Mesh) -> None:
    said = ends_at(await walk(one, one.app_id("b"), MESH_SYS_CONFIG="/nowhere"), NAME)
    assert "gateway is not known" in said
    one.app("a").agent.failing = True
    assert "no identity" in ends_at(await walk(one, one.app_id("b")), NAME)


async def test_a_domain_that_leaves_no_room(one: Mesh) -> None:
    base = ".".join(["a" * 53, *["a" * 51] * 3])  # room for a port of one digit
    said = ends_at(await walk(one, one.app_id("b"), MESH_GATEWAY=base), NAME)
    assert "correct the app-id, or the gateway's domain" in said


async def test_a_name_that_does_not_resolve(one: Mesh) -> None:
    environ = {"MESH_GATEWAY": "gateway.invalid", "MESH_GATEWAY_CONNECT": "unset"}
    said = ends_at(await walk(one, one.app_id("b"), **environ), RESOLVES)
    assert "does not resolve" in said


async def test_a_gateway_that_is_down(one: Mesh) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{taken.getsockname()[1]}"
        said = ends_at(await walk(one, one.app_id("b"), MESH_GATEWAY_CONNECT=nowhere), CONNECTS)
    assert "Connection refused" in said


async def test_an_app_that_the_gateway_does_not_know(one: Mesh) -> None:
    said = ends_at(await walk(one, new_app_id()), TLS)
    assert "knows no such app" in said


async def test_a_gateway_that_says_nothing(one: Mesh) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {
            "MESH_GATEWAY_CONNECT": f"127.0.0.1:{silent.getsockname()[1]}",
            "MESH_CONNECT_TIMEOUT": "300ms",
        }
        assert "no handshake within 0.3 s" in ends_at(
            await walk(one, one.app_id("b"), **environ), TLS
        )


async def test_a_target_under_another_kms(one: Mesh) -> None:
    with Impostor(Kms.create().issue(one.app_id("b")), answer=any_answer) as there:
        environ = {"MESH_GATEWAY_CONNECT": str(there.address)}
        assert "another KMS" in ends_at(await walk(one, one.app_id("b"), **environ), CHAIN)
        assert there.application_bytes == 0


async def test_another_app_at_its_address(one: Mesh) -> None:
    other = new_app_id()
    with Impostor(one.world.kms.issue(other), answer=any_answer) as there:
        environ = {"MESH_GATEWAY_CONNECT": str(there.address)}
        said = ends_at(await walk(one, one.app_id("b"), **environ), APP_ID)
        assert f"it is app {other}" in said
        assert there.application_bytes == 0, "it is not asked for /health"


async def test_a_target_that_refuses_us(one: Mesh) -> None:
    foreign = Kms.create()
    with Impostor(
        one.world.kms.issue(one.app_id("b")), client_ca_pem=foreign.root_pem, answer=any_answer
    ) as there:
        environ = {"MESH_GATEWAY_CONNECT": str(there.address)}
        said = ends_at(await walk(one, one.app_id("b"), **environ), HEALTH)
    assert "refused our certificate" in said


async def test_a_target_that_is_no_mesh(one: Mesh) -> None:
    def answer(received: bytes) -> bytes | None:
        return b"HTTP/1.1 404 Not Found\r\n\r\n" if received else None

    with Impostor(one.world.kms.issue(one.app_id("b")), answer=answer) as there:
        environ = {"MESH_GATEWAY_CONNECT": str(there.address)}
        said = ends_at(await walk(one, one.app_id("b"), **environ), HEALTH)
    assert "it answers 'HTTP/1.1 404'" in said

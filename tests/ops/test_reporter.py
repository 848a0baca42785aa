from __future__ import annotations

import json

from tests.integration.harness import Client, Mesh, eventually, request
from tests.integration.test_auth_service import address_of, connected, question
from tests.integration.tls_peers import caller_context
from tests.ops.asking import ask, metrics, status

from dstack_mesh.ops.report import Peer


async def test_who_calls_whom(one: Mesh) -> None:
    a = await one.start("a")
    b = await one.start("b", MESH_ALLOWED_APPS=one.app_id("a"))
    await one.start("c")
    for _ in range(3):
        assert (await one.call("a", "b")).status == 200
    assert (await one.call("c", "b")).status == 403
    assert (await one.call("a", "ee" * 20)).status == 502
    assert (await one.call("a", None, path="/info")).status == 200
    await eventually(lambda: len(a.journal.incidents()) == 1)

    port = one.inbound("b").port
    outbound = await status(one, "a")
    by_name = {peer.name: peer for peer in outbound.targets}
    assert list(by_name) == [f"{one.app_id('b')}:{port}", f"{'ee' * 20}:{port}"], "busiest first"
    called = by_name[f"{one.app_id('b')}:{port}"]
    assert called == Peer(called.name, 3, 0, 0, 1, None), "one connection, used again and idle"
    lost = by_name[f"{'ee' * 20}:{port}"]
    assert (lost.requests, lost.errors, lost.active, lost.idle) == (1, 1, 0, 0)
    assert lost.last_error is not None
    assert (lost.last_error.code, outbound.incidents[0].code) == ("tls_failed", "tls_failed")
    assert outbound.incidents[0].peer == "ee" * 20

    inbound = await status(one, "b")
    assert inbound.callers == [
        Peer(one.app_id("a"), 3, 0, 1, 0, None),
        Peer(one.app_id("c"), 1, 1, 1, 0, inbound.callers[1].last_error),
    ]
    assert inbound.decisions == {"allow": 3, "audit": 0, "deny": 1}
    (denied,) = inbound.incidents
    assert (denied.code, denied.direction, denied.peer) == (
        "policy_denied",
        "inbound",
        one.app_id("c"),
    )
    assert b.journal.incidents() == inbound.incidents


async def test_traffic_by_direction(one: Mesh) -> None:
    await one.start("a")
    await one.start("b")
    for _ in range(2):
        await one.call("a", "b", "POST", body=b"12345")
    await one.call("a", None, path="/info")
    await one.call("a", None, path="/health")
    found = (await status(one, "a")).traffic
    assert {way: one.requests for way, one in found.items()} == {
        "outbound": 3,
        "inbound": 0,
        "agent": 1,
    }
    assert found["outbound"].classes == {"2xx": 3}
    assert found["outbound"].bytes_up == 10
    assert sum(found["agent"].buckets) == 1
    assert (found["outbound"].upstream_idle, found["agent"].upstream_idle) == (1, 1)
    inbound = (await status(one, "b")).traffic["inbound"]
    assert (inbound.requests, inbound.upstream_idle, inbound.downstream) == (2, 1, 1)


async def test_identity_gateway_and_listeners(one: Mesh) -> None:
    sidecar = await one.start("a", MESH_ALLOWED_APPS="self")
    code, body = await ask(one, "a", "/status")
    found = json.loads(body)
    snapshot = sidecar.identity.require()
    assert code == 200
    assert found["readiness"]["ready"] is True
    assert found["readiness"]["checks"]["backend"]["ok"] is True
    identity = found["identity"]
    assert identity["app_id"] == one.app_id("a")
    assert (identity["not_after"], identity["renew_at"]) == (snapshot.not_after, snapshot.renew_at)
    assert identity["loaded_at"] <= found["now"]
    assert snapshot.app_info is not None
    assert identity["compose_hash"] == snapshot.app_info.compose_hash
    assert found["gateway"]["domain"] == sidecar.directory.text
    assert found["gateway"]["is_configured"] is False
    assert found["listeners"] == sidecar.bound()
    assert found["settings"]["inbound.allow"] == "self"
    assert found["workers"] == 1


async def test_before_there_is_an_identity_status_says_why(one: Mesh) -> None:
    await one.app("a").agent.aclose()
    await one.start_closed("a", MESH_ADMIN_LISTEN="127.0.0.1:0")
    sidecar = one.sidecars["a"]
    await eventually(lambda: sidecar.identity.failed > 0)
    found = await status(one, "a")
    assert not found.readiness.ready
    assert found.identity.app_id is None
    assert found.identity.problem
    assert found.callers == []
    assert "identity_expiry_timestamp_seconds" not in await metrics(one, "a")


async def test_a_caller_without_a_certificate_is_seen(one: Mesh) -> None:
    await one.start("b")
    context = caller_context(one.world.kms.root_pem)
    async with Client.connect(one.inbound("b"), context) as nobody:
        await nobody.send(request("GET", "/admin?x=1"))
        assert (await nobody.answer()).status == 401
    async with Client.connect(one.inbound("b")) as plain:
        await plain.send(b"GET / HTTP/1.1\r\n\r\n")
        await plain.closed()
    await eventually(lambda: len(one.sidecars["b"].journal.incidents()) == 2)
    found = await status(one, "b")
    assert [incident.code for incident in found.incidents] == [
        "handshake_failed",
        "client_cert_required",
    ]
    assert found.incidents[1].path == "/admin"
    assert found.callers == []


async def test_in_nginx_mode_callers_are_those_that_nginx_asked_about(one: Mesh) -> None:
    app_id = one.app_id("c")
    await one.start("b", MESH_INBOUND_MODE="nginx", MESH_ALLOWED_APPS="self", backend=False)
    async with connected(address_of(one)) as nginx:
        await nginx.send(question(one.world.kms.issue(app_id)))
        assert (await nginx.answer()).status == 403
    found = await status(one, "b")
    (denied,) = found.incidents
    assert (denied.peer, denied.method, denied.path) == (app_id, "GET", "/a")
    assert [(peer.name, peer.requests) for peer in found.callers] == [(app_id, 1)]


async def test_a_mesh_that_stops_still_tells_its_status(one: Mesh) -> None:
    sidecar = await one.start("b")
    bound = sidecar.bound()
    await sidecar.drain()
    code, body = await ask(one, "b", "/status")
    assert code == 200
    found = json.loads(body)
    assert found["listeners"] == bound, "though their sockets are closed"
    assert found["readiness"]["checks"]["draining"]["ok"] is False
    assert (await ask(one, "b", "/readyz"))[0] == 503
    assert (await ask(one, "b", "/metrics"))[0] == 200

from __future__ import annotations

import asyncio

from tests.integration.harness import Client, Mesh, eventually
from tests.ops.asking import ask, metrics, status

from dstack_mesh.sim.messages import Request, Response


async def test_metrics_by_direction_and_side(one: Mesh) -> None:
    await one.start("a")
    await one.start("b")
    await one.call("a", "b")
    await one.call("a", None, path="/info")
    await one.call("a", "not-an-app")
    async with Client.connect(one.outbound("a")) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        assert (await client.answer()).error == "bad_request"
        found = await metrics(one, "a")
    # labels in the order code, direction, method, status_class
    assert found["requests_total"] == {
        ("", "outbound", "GET", "2xx"): 1,
        ("", "agent", "GET", "2xx"): 1,
        ("bad_target", "outbound", "GET", "4xx"): 1,
        ("bad_request", "outbound", "other", "4xx"): 1,
    }
    assert found["connections_open"] == {
        ("outbound", "downstream"): 1,
        ("outbound", "upstream"): 1,
        ("inbound", "downstream"): 0,
        ("inbound", "upstream"): 0,
        ("agent", "upstream"): 1,
    }
    assert found["pool_connections"] == {("active",): 0, ("idle",): 2}
    assert {key: n for key, n in found["handshakes_total"].items() if n} == {("outbound", "ok"): 1}
    assert found["identity_renewals_total"] == {("ok",): 1, ("failed",): 0}
    identity = one.sidecars["a"].identity.require()
    assert found["identity_expiry_timestamp_seconds"] == {(): identity.not_after}


async def test_a_busy_connection_is_active(one: Mesh) -> None:
    await one.start("a")
    await one.start("b")
    release = asyncio.Event()

    async def wait(_: Request) -> Response:
        await release.wait()
        return Response(200)

    one.backends["b"].on("/wait", wait)
    call = asyncio.ensure_future(one.call("a", "b", path="/wait"))
    await eventually(lambda: len(one.backends["b"].requests) == 1)
    found = await status(one, "a")
    assert (found.targets[0].active, found.targets[0].idle) == (1, 0)
    assert (await metrics(one, "a"))["pool_connections"] == {("active",): 1, ("idle",): 0}
    release.set()
    assert (await call).status == 200


async def test_listed_apps_have_metrics_of_their_own_and_no_other_app_is_named(one: Mesh) -> None:
    await one.start("a", MESH_LABEL_APPS=one.app_id("b"))
    await one.start("b")
    await one.start("c")
    for target in ("b", "b", "c", "ee" * 20):
        await one.call("a", target)
    await one.call("c", "a")
    code, body = await ask(one, "a", "/metrics")
    assert code == 200
    found = await metrics(one, "a")
    # labels in the order app, direction
    assert found["peer_requests_total"] == {
        (one.app_id("b"), "outbound"): 2,
        ("other", "outbound"): 2,
        ("other", "inbound"): 1,
    }
    assert found["peer_errors_total"][("other", "outbound")] == 1
    assert one.app_id("c").encode() not in body
    assert one.app_id("a").encode() not in body
    code, body = await ask(one, "b", "/metrics")
    assert b"peer_requests_total" not in body
    assert one.app_id("a").encode() not in body, "unless it is listed, no app-id is a label"

"""Finding the gateway, following it when it moves, and naming targets to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.model import TcpAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.gateway import GatewayInfo
from tests.integration.harness import (
    Client,
    Mesh,
    Wire,
    eventually,
    mesh,
    origin,
    problem,
    request,
)


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Mesh]:
    """A mesh in which only `b`, the one to be called, runs yet."""
    async with mesh(tmp_path) as one:
        await one.start("b")
        yield one


def sys_config(one: Mesh, fields: object) -> str:
    """Write a system configuration for `a`, and give its path."""
    path = one.app("a").directory / "other-config.json"
    path.write_text(json.dumps(fields))
    return str(path)


def default_port(one: Mesh) -> str:
    return one.app("b").env["MESH_DEFAULT_PORT"]


async def domain(one: Mesh) -> object:
    answer = await one.call("a", None, path="/gateway")
    assert answer.status == 200, answer
    return json.loads(answer.body)["gateway_domain"]


# Finding it.


async def test_the_first_url_that_answers_is_taken(target: Mesh) -> None:
    info = target.world.gateway.info_url

    async def say_nothing_useful(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    failing = GatewayInfo("failing.test")
    failing.failing = True
    failing_at = await failing.server.start_tcp()
    async with origin(say_nothing_useful) as (useless, useless_at):
        urls = [
            "http://127.0.0.1:9",
            f"http://{useless_at}",
            f"https://{failing_at}",
            "not a url",
            info + "/",
            "https://127.0.0.1:9",
        ]
        path = sys_config(target, {"gateway_urls": urls})
        await target.start("a", backend=False, MESH_SYS_CONFIG=path)
        assert (await target.call("a", "b")).status == 200
        assert len(useless.wires) == 1
        assert failing.requests == 1
    await failing.server.aclose()


async def test_tproxy_urls_of_older_systems(target: Mesh) -> None:
    path = sys_config(target, {"tproxy_urls": [target.world.gateway.info_url]})
    await target.start("a", backend=False, MESH_SYS_CONFIG=path)
    assert (await target.call("a", "b")).status == 200


@pytest.mark.parametrize(
    "fields", [{}, {"gateway_urls": []}, {"gateway_urls": ["http://127.0.0.1:9"]}, [], "text"]
)
async def test_no_gateway_to_be_found(target: Mesh, fields: object) -> None:
    """The reason is told, and the rest works: `/gateway` names the same error."""
    path = sys_config(target, fields)
    await target.start_closed("a", MESH_SYS_CONFIG=path, MESH_OUTBOUND_LISTEN="127.0.0.1:0")
    sidecar = target.sidecars["a"]
    await asyncio.wait_for(sidecar.identity.wait_loaded(), 10)
    await eventually(lambda: "asked yet" not in str(sidecar.directory.reason))
    for target_app in ("b", None):
        answer = await target.call("a", target_app, path="/gateway")
        fields_ = problem(answer, "gateway_unknown", 503)
        expected = "127.0.0.1:9" if "9" in str(fields) else "other-config.json"
        assert expected in str(fields_["detail"])
        assert answer.get(b"retry-after") == b"1"
    assert (await target.call("a", None, path="/info")).status == 200


async def test_a_url_with_credentials_is_not_repeated(target: Mesh) -> None:
    path = sys_config(target, {"gateway_urls": ["http://user:secret@127.0.0.1:9"]})
    await target.start_closed("a", MESH_SYS_CONFIG=path, MESH_OUTBOUND_LISTEN="127.0.0.1:0")
    sidecar = target.sidecars["a"]
    await asyncio.wait_for(sidecar.identity.wait_loaded(), 10)
    await eventually(lambda: "asked yet" not in str(sidecar.directory.reason))
    answer = await target.call("a", "b")
    problem(answer, "gateway_unknown", 503)
    assert b"secret" not in answer.body


async def test_no_file_at_all(target: Mesh) -> None:
    await target.start_closed(
        "a", MESH_SYS_CONFIG="/nonexistent/config.json", MESH_OUTBOUND_LISTEN="127.0.0.1:0"
    )
    await asyncio.wait_for(target.sidecars["a"].identity.wait_loaded(), 10)
    await eventually(lambda: "asked yet" not in str(target.sidecars["a"].directory.reason))
    fields = problem(await target.call("a", "b"), "gateway_unknown", 503)
    assert "/nonexistent/config.json" in str(fields["detail"])


# Following it.


async def test_a_failed_connection_has_the_gateway_asked_again(
    target: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the new base domain is the one in the next server name, old connections or not."""
    monkeypatch.setattr("dstack_mesh.dstack.gateway.MIN_GAP", 0.05)
    gateway = target.world.gateway
    await target.start("a", backend=False)
    assert (await target.call("a", "b")).status == 200
    assert gateway.info.requests == 2  # one of each sidecar
    gateway.base_domain = gateway.info.base_domain = "moved.dstack.test"
    await gateway.stop_accepting()
    gateway.drop_connections()
    problem(await target.call("a", "b"), "connect_failed", 502)
    await eventually(lambda: gateway.info.requests >= 3)
    await gateway.resume_accepting()
    await eventually(lambda: "moved" in str(target.sidecars["a"].directory.text))
    assert (await target.call("a", "b")).status == 200
    assert str(await domain(target)).startswith("moved.dstack.test")
    app_id, port = target.app_id("b"), default_port(target)
    assert gateway.connections[f"{app_id}-{port}s.moved.dstack.test"] == 1


async def test_it_is_asked_again_now_and_then(
    target: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed domain moves new requests, on client connections that are open already too."""
    monkeypatch.setattr("dstack_mesh.dstack.gateway.REFRESH", 0.05)
    monkeypatch.setattr("dstack_mesh.dstack.gateway.MIN_GAP", 0.05)
    gateway = target.world.gateway
    await target.start("a", backend=False)
    assert (await target.call("a", "b")).status == 200
    gateway.base_domain = gateway.info.base_domain = "moved.dstack.test"
    await eventually(lambda: "moved" in str(target.sidecars["a"].directory.text))
    assert (await target.call("a", "b")).status == 200
    names = {name.partition(".")[2] for name in gateway.connections}
    assert names == {"sim.dstack.test", "moved.dstack.test"}


async def test_the_last_good_answer_stays(target: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_mesh.dstack.gateway.REFRESH", 0.02)
    monkeypatch.setattr("dstack_mesh.dstack.gateway.MIN_GAP", 0.02)
    gateway = target.world.gateway
    await target.start("a", backend=False)
    for fault in (b"nonsense", b"", None):
        gateway.info.nonsense = fault
        gateway.info.failing = fault is None
        seen = gateway.info.requests
        await eventually(lambda n=seen: gateway.info.requests >= n + 4)  # type: ignore[misc]
        assert (await target.call("a", "b")).status == 200
    assert sum(gateway.connections.values()) == 1


async def test_failures_do_not_have_it_asked_more_often_than_they_may(target: Mesh) -> None:
    await target.start("a", backend=False)
    gateway = target.world.gateway
    before = gateway.info.requests
    await gateway.stop_accepting()
    for _ in range(20):
        problem(await target.call("a", "b"), "connect_failed", 502)
    assert gateway.info.requests <= before + 1
    await gateway.resume_accepting()
    assert (await target.call("a", "b")).status == 200


# Set by hand.


async def test_a_domain_set_by_hand(target: Mesh) -> None:
    gateway = target.world.gateway
    before = gateway.info.requests
    await target.start(
        "a", backend=False, MESH_GATEWAY="SIM.dstack.test.:8443", MESH_SYS_CONFIG="/nonexistent"
    )
    assert (await target.call("a", "b")).status == 200
    assert await domain(target) == "SIM.dstack.test.:8443"
    assert gateway.info.requests == before
    app_id, port = target.app_id("b"), default_port(target)
    assert gateway.connections == {f"{app_id}-{port}s.sim.dstack.test": 1}


async def test_a_fixed_address(target: Mesh) -> None:
    """Everything goes there, whatever the port asked for is, and who answers is still checked."""
    inbound = target.inbound("b")
    await target.start(
        "a", backend=False, MESH_GATEWAY=f"fixed/{inbound}", MESH_GATEWAY_CONNECT="unset"
    )
    for port in ("1", "443"):
        answer = await target.call("a", "b", headers=[("x-dstack-target-port", port)])
        assert answer.status == 200
    assert await domain(target) == f"fixed/{inbound}"
    problem(await target.call("a", "a"), "peer_app_id_mismatch", 502)
    assert not target.world.gateway.connections


async def test_a_fixed_name_is_the_server_name(target: Mesh) -> None:
    gateway = target.world.gateway
    await target.start("a", backend=False, MESH_GATEWAY="fixed/vpc-server:8443")
    problem(await target.call("a", "b"), "tls_failed", 502)
    assert gateway.connections == {"vpc-server": 1}


async def test_a_domain_that_leaves_no_room_for_the_target(target: Mesh) -> None:
    """A host name has at most 253 characters, and how long one is depends on the port."""
    base = ".".join(["x" * 49] * 4) + ".test"
    base += "x" * (206 - len(base))
    await target.start("a", backend=False, MESH_GATEWAY=base)
    room = await target.call("a", "b", headers=[("x-dstack-target-port", "1234")])
    problem(room, "tls_failed", 502)
    none = await target.call("a", "b", headers=[("x-dstack-target-port", "12345")])
    assert "254" in str(problem(none, "bad_target", 400)["detail"])


# Naming targets.


async def test_app_instance_and_port_make_the_server_name(target: Mesh) -> None:
    await target.start("a", backend=False)
    gateway, b = target.world.gateway, target.app("b")
    port = default_port(target)
    await target.call("a", "b")
    await target.call("a", "b", headers=[("x-dstack-target-port", port)])
    await target.call("a", "b", headers=[("X-Dstack-Target-Instance", b.instance_id.upper())])
    answer = await target.call("a", "b", headers=[("x-dstack-target-port", "1")])
    problem(answer, "tls_failed", 502)
    domain = gateway.base_domain
    assert gateway.connections == {
        f"{b.app_id}-{port}s.{domain}": 1,
        f"{b.instance_id}-{port}s.{domain}": 1,
        f"{b.app_id}-1s.{domain}": 1,
    }
    assert not [
        name
        for one in target.backends["b"].requests
        for name, _ in one.headers
        if "target" in name.lower()
    ]


async def test_the_default_port(target: Mesh) -> None:
    await target.start("a", backend=False, MESH_DEFAULT_PORT="7")
    await target.call("a", "b")
    assert list(target.world.gateway.connections) == [f"{target.app_id('b')}-7s.sim.dstack.test"]


async def test_an_instance_is_still_held_to_the_app_id(target: Mesh) -> None:
    """An instance of another app is not what was asked for."""
    await target.start("a")
    fields = [("x-dstack-target-instance", target.app("a").instance_id)]
    problem(await target.call("a", "b", headers=fields), "peer_app_id_mismatch", 502)
    assert not target.backends["a"].connections


async def test_pooled_connections_are_not_shared_between_names(target: Mesh) -> None:
    await target.start("a")
    gateway, b = target.world.gateway, target.app("b")
    instance = [("x-dstack-target-instance", b.instance_id)]
    for _ in range(3):
        for headers in ([], instance):
            assert (await target.call("a", "b", headers=headers)).status == 200
        assert (await target.call("a", "a")).get(b"x-backend") == b"a"
    assert sorted(gateway.connections.values()) == [1, 1, 1]


async def test_instances_take_turns(target: Mesh) -> None:
    """An instance that is down is passed over by the gateway, and nobody notices."""
    gateway, b = target.world.gateway, target.app("b")
    gateway.remove_route(b.app_id)
    down = TcpAddress("127.0.0.1", 9)
    gateway.add_route(b.app_id, down.host, down.port)
    gateway.add_route(b.app_id, b.host)
    await target.start("a", backend=False)
    for _ in range(3):
        assert (await target.call("a", "b")).status == 200
        gateway.drop_connections()


# More of finding and following it.


async def start_astray(target: Mesh, **environ: str) -> None:
    """Start `a` where it finds no gateway; its identity is there, and one look-up has failed."""
    await target.start_closed("a", MESH_OUTBOUND_LISTEN="127.0.0.1:0", **environ)
    sidecar = target.sidecars["a"]
    await asyncio.wait_for(sidecar.identity.wait_loaded(), 10)
    await eventually(lambda: "asked yet" not in str(sidecar.directory.reason))


async def test_a_url_where_nobody_answers_is_not_waited_for(
    target: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_mesh.dstack.gateway.ASK_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}", target.world.gateway.info_url]
        path = sys_config(target, {"gateway_urls": urls})
        await target.start("a", backend=False, MESH_SYS_CONFIG=path)
        assert (await target.call("a", "b")).status == 200


async def test_the_newer_name_of_the_urls_wins(target: Mesh) -> None:
    fields = {
        "gateway_urls": [target.world.gateway.info_url],
        "tproxy_urls": ["http://127.0.0.1:9"],
    }
    await target.start("a", backend=False, MESH_SYS_CONFIG=sys_config(target, fields))
    assert (await target.call("a", "b")).status == 200


async def test_no_gateway_answers_until_one_does(
    target: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names every URL and why; a client's connection lives to see the end of it."""
    monkeypatch.setattr("dstack_mesh.dstack.gateway.FIRST_RETRY", 0.05)
    info, url = target.world.gateway.info, target.world.gateway.info_url
    info.failing = True
    path = sys_config(target, {"gateway_urls": ["http://127.0.0.1:9", url]})
    await start_astray(target, MESH_SYS_CONFIG=path)
    to_b = ("x-dstack-target-app", target.app_id("b"))
    async with Client.connect(target.outbound("a")) as client:
        await client.send(request("GET", "/", [to_b]))
        detail = str(problem(await client.answer(), "gateway_unknown", 503)["detail"])
        assert "http://127.0.0.1:9" in detail
        assert url in detail
        assert "500" in detail
        info.failing = False
        await eventually(lambda: target.sidecars["a"].directory.current is not None)
        await client.send(request("GET", "/", [to_b]))
        assert (await client.answer()).body == b"hello\n"


@pytest.mark.parametrize("before", [None, "", "\x00", '{"gateway_urls": "x"}'])
async def test_a_file_that_comes_late(
    target: Mesh, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """It is read anew for each look-up."""
    monkeypatch.setattr("dstack_mesh.dstack.gateway.FIRST_RETRY", 0.05)
    path = target.app("a").directory / "sys-config.json"
    good = path.read_text()
    path.unlink()
    if before is not None:
        path.write_text(before)
    await start_astray(target)
    fields = problem(await target.call("a", "b"), "gateway_unknown", 503)
    assert str(path) in str(fields["detail"])
    path.write_text(good)
    await eventually(lambda: target.sidecars["a"].directory.current is not None)
    assert (await target.call("a", "b")).status == 200


async def test_failed_connections_have_it_asked_once_in_each_gap(
    target: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap = 0.3
    monkeypatch.setattr("dstack_mesh.dstack.gateway.MIN_GAP", gap)
    info = target.world.gateway.info
    before, began, failures = info.requests, time.monotonic(), 0
    await target.start("a", backend=False)
    await target.world.gateway.stop_accepting()
    while info.requests < before + 4:  # the first look-up, and three more
        problem(await target.call("a", "b"), "connect_failed", 502)
        failures += 1
    assert time.monotonic() - began >= 3 * gap
    assert failures > 4


async def test_an_app_that_is_not_there_has_nobody_asked(
    target: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway was reached: it is no failure of a connection to it."""
    monkeypatch.setattr("dstack_mesh.dstack.gateway.MIN_GAP", 0.01)
    await target.start("a", backend=False)
    before = target.world.gateway.info.requests
    for _ in range(10):
        problem(await target.call("a", "0" * 40), "tls_failed", 502)
        assert (await target.call("a", "b")).status == 200
    assert target.world.gateway.info.requests == before


# More of what is set by hand.


async def test_by_hand_nobody_is_ever_asked(target: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when connections fail. `DSTACK_GATEWAY_DOMAIN` is the setting's older name."""
    monkeypatch.setattr("dstack_mesh.dstack.gateway.MIN_GAP", 0.01)
    gateway = target.world.gateway
    before = gateway.info.requests
    await target.start("a", backend=False, DSTACK_GATEWAY_DOMAIN="sim.dstack.test")
    await gateway.stop_accepting()
    for _ in range(10):
        problem(await target.call("a", "b"), "connect_failed", 502)
    await gateway.resume_accepting()
    assert (await target.call("a", "b")).status == 200
    assert await domain(target) == "sim.dstack.test"
    assert gateway.info.requests == before


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_a_fixed_address_is_no_server_name(target: Mesh, host: str) -> None:
    """RFC 6066 3."""
    await target.start("a", backend=False, MESH_GATEWAY=f"fixed/{host}:443")
    problem(await target.call("a", "b"), "tls_failed", 502)
    assert target.world.gateway.connections == {"": 1}


# More of naming targets: what is asked for is also what answers.


@contextlib.asynccontextmanager
async def second_b(target: Mesh, listen: str) -> AsyncIterator[tuple[Backend, Backend]]:
    """Run another sidecar of `b`, with a backend of its own; give the first's and that."""
    first = target.backends.pop("b")
    try:
        await target.start("b", MESH_INBOUND_LISTEN=listen)
        yield first, target.backends["b"]
    finally:
        await first.aclose()


async def test_this_very_instance_answers(target: Mesh) -> None:
    """By the app's name its instances take turns; by an instance's, it is always that one."""
    await target.start("a", backend=False)
    gateway, b, other = target.world.gateway, target.app("b"), "2b" * 20
    async with second_b(target, f"127.77.0.2:{default_port(target)}") as (first, second):
        for identifier in (other, b.app_id):
            gateway.add_route(identifier, "127.77.0.2")
        for _ in range(3):
            headers = [("x-dstack-target-instance", other)]
            assert (await target.call("a", "b", headers=headers)).status == 200
        assert (len(first.requests), len(second.requests)) == (0, 3)
        for _ in range(2):
            headers = [("x-dstack-target-instance", b.instance_id)]
            assert (await target.call("a", "b", headers=headers)).status == 200
        assert (len(first.requests), len(second.requests)) == (2, 3)


async def test_this_very_port_answers(target: Mesh) -> None:
    await target.start("a", backend=False)
    async with second_b(target, f"{target.app('b').host}:0") as (first, second):
        for port in (default_port(target), str(target.inbound("b").port)):
            headers = [("x-dstack-target-port", port)]
            assert (await target.call("a", "b", headers=headers)).status == 200
        assert (len(first.requests), len(second.requests)) == (1, 1)
        assert (await target.call("a", "b")).status == 200
        assert (len(first.requests), len(second.requests)) == (2, 1)


async def test_the_default_port_is_443(target: Mesh) -> None:
    await target.start("a", backend=False, MESH_DEFAULT_PORT="unset")
    gateway, b, inbound = target.world.gateway, target.app("b"), target.inbound("b")
    gateway.remove_route(b.app_id)
    gateway.add_route(b.app_id, inbound.host, inbound.port)
    assert (await target.call("a", "b")).status == 200
    assert gateway.connections == {f"{b.app_id}-443s.{gateway.base_domain}": 1}

"""What users of the Rust mesh send and get: request headers, paths, and headers at the backend."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.harness import Client, Mesh, mesh, request


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with mesh(tmp_path) as found:
        await found.start("a")
        await found.start("b")
        yield found


async def test_target_app_in_either_case(one: Mesh) -> None:
    for app_id in (one.app_id("b"), one.app_id("b").upper()):
        answer = await one.call("a", None, "GET", "/", [("X-Dstack-Target-App", app_id)])
        assert (answer.status, answer.get(b"x-backend")) == (200, b"b")


async def test_target_port_and_instance(one: Mesh) -> None:
    """`{instance or app}-{port}s.{gateway domain}` is the name that the gateway sees."""
    port = one.inbound("b").port
    domain = one.world.gateway.base_domain
    await one.call("a", "b", "GET", "/", [("x-dstack-target-port", str(port))])
    instance = one.app("b").instance_id
    await one.call("a", "b", "GET", "/", [("x-dstack-target-instance", instance)])
    seen = one.world.gateway.connections
    assert set(seen) == {f"{one.app_id('b')}-{port}s.{domain}", f"{instance}-{port}s.{domain}"}


async def test_port_443_when_none_is_named(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        await one.start("a", MESH_DEFAULT_PORT="unset")
        await one.call("a", "b")
        assert list(one.world.gateway.connections) == [
            f"{one.app_id('b')}-443s.{one.world.gateway.base_domain}"
        ]


async def test_target_headers_do_not_reach_the_backend(one: Mesh) -> None:
    port = str(one.inbound("b").port)
    answer = await one.call("a", "b", "GET", "/echo", [("x-dstack-target-port", port)])
    names = {name.lower() for name, _ in json.loads(answer.body)["headers"]}
    assert not {name for name in names if name.startswith("x-dstack-target")}


async def test_the_backend_learns_who_called(one: Mesh) -> None:
    answer = await one.call("a", "b", "GET", "/echo", [("x-dstack-app-id", "somebody else")])
    fields = [(name.lower(), value) for name, value in json.loads(answer.body)["headers"]]
    assert [value for name, value in fields if name == "x-dstack-app-id"] == [one.app_id("a")]
    names = {name for name, _ in fields}
    assert {"x-forwarded-for", "x-forwarded-proto", "x-real-ip"} <= names


async def test_host_and_path_are_the_apps(one: Mesh) -> None:
    answer = await one.call("a", "b", "GET", "/echo?a=%20b", [("Host", "vpc-server")])
    seen = json.loads(answer.body)
    assert seen["target"] == "/echo?a=%20b"
    assert ["Host", "vpc-server"] in seen["headers"]


@pytest.mark.parametrize(
    "path",
    [
        "/info",
        "/Info",
    ],
)
async def test_calls_of_the_agent(one: Mesh, path: str) -> None:
    answer = await one.call("a", None, "GET", path)
    assert json.loads(answer.body)["app_id"] == one.app_id("a")


@pytest.mark.parametrize(
    "path", ["/get_quote", "/get-quote", "/getQuote", "/GetQuote", "/get_quote?report_data=00"]
)
async def test_any_spelling_of_an_agent_call(one: Mesh, path: str) -> None:
    separator = "&" if "?" in path else "?"
    data = "" if "report_data" in path else f"{separator}report_data=00"
    answer = await one.call("a", None, "GET", path + data)
    assert answer.status == 200, answer.body
    assert "quote" in json.loads(answer.body)


async def test_health_and_gateway_are_the_meshs_own(one: Mesh) -> None:
    assert (await one.call("a", None, "GET", "/health")).status == 200
    told = json.loads((await one.call("a", None, "GET", "/gateway")).body)
    assert list(told) == ["gateway_domain"]


async def test_health_on_the_callers_side_needs_no_certificate(one: Mesh) -> None:

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    async with Client.connect(one.inbound("b"), context) as client:
        await client.send(request("GET", "/health"))
        assert (await client.answer()).status == 200

"""The guest agent through the outbound listener: the call's name is spelled out, the rest stays."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.sim.agent import GuestAgent
from dstack_mesh.sim.backend import Backend
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    Wire,
    answers,
    eventually,
    mesh,
    origin,
    problem,
    request,
)

MIB = 1024 * 1024
JSON = ("Content-Type", "application/json")


def setting(address: Address) -> str:
    return str(address) if isinstance(address, UnixAddress) else f"http://{address}"


@pytest.fixture(params=["unix", "tcp"])
async def one(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Mesh]:
    """`a` alone, its agent on a unix socket or on TCP."""
    async with mesh(tmp_path, ["a"]) as alone:
        environ = {}
        if request.param == "tcp":
            agent = alone.app("a").agent
            await agent.aclose()
            environ["DSTACK_AGENT_ADDRESS"] = setting(await agent.start(TcpAddress("127.0.0.1", 0)))
        await alone.start("a", backend=False, **environ)
        yield alone


def agent_of(one: Mesh) -> GuestAgent:
    return one.app("a").agent


async def ask(
    one: Mesh,
    path: str,
    method: str = "GET",
    headers: list[tuple[str, str]] | None = None,
    body: bytes = b"",
) -> Answer:
    return await one.call("a", None, method, path, headers or [], body)


@contextlib.asynccontextmanager
async def standing_in(tmp_path: Path, address: Address, **environ: str) -> AsyncIterator[Mesh]:
    """Run `a` with its identity from files, so that anything may be its agent."""
    async with mesh(tmp_path, ["a"]) as alone:
        issued = alone.world.kms.issue(alone.app_id("a"))
        files = {
            "MESH_CERT_FILE": b"".join(issued.chain_pem),
            "MESH_KEY_FILE": issued.key_pem,
            "MESH_CA_FILE": alone.world.kms.root_pem,
        }
        for name, content in files.items():
            path = tmp_path / f"{name}.pem"
            path.write_bytes(content)
            path.chmod(0o600)
            environ[name] = str(path)
        environ["DSTACK_AGENT_ADDRESS"] = setting(address)
        await alone.start("a", backend=False, **environ)
        yield alone


@contextlib.asynccontextmanager
async def recording(tmp_path: Path, kind: str) -> AsyncIterator[tuple[Mesh, Backend]]:
    """Run `a` with a recording backend in its agent's place; the call `/Echo` tells what came."""
    agent = Backend("agent")
    for name in ("echo", "upload", "download", "events"):
        agent.on(f"/{name.capitalize()}", agent._handlers[f"/{name}"])
    where: Address = TcpAddress("127.0.0.1", 0)
    if kind == "unix":
        where = UnixAddress(str(tmp_path / "stand-in.sock"))
    try:
        async with standing_in(tmp_path, await agent.start(where)) as alone:
            yield alone, agent
    finally:
        await agent.aclose()


# The path.


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/info", "Info"),
        ("/Info", "Info"),
        ("/INFO", "Info"),
        ("/%69nfo", "Info"),
        ("/version", "Version"),
        ("/get_quote?report_data=00", "GetQuote"),
        ("/get-quote?report_data=00", "GetQuote"),
        ("/getQuote?report_data=00", "GetQuote"),
        ("/GetQuote?report_data=00", "GetQuote"),
        ("/gpu_info", "GpuInfo"),
        ("/get_tls_key?subject=x", "GetTlsKey"),
    ],
)
async def test_a_call_in_any_spelling(one: Mesh, path: str, call: str) -> None:
    agent = agent_of(one)
    before = agent.calls[call]
    answer = await ask(one, path)
    assert (answer.status, answer.error) == (200, ""), answer
    assert answer.get(b"content-type") == b"application/json"
    assert agent.calls[call] == before + 1


async def test_info_says_who_one_is(one: Mesh) -> None:
    answer = await ask(one, "/info")
    fields = json.loads(answer.body)
    assert fields["app_id"] == one.app_id("a")
    assert fields["instance_id"] == one.app("a").instance_id


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("target", "came"),
    [
        ("/echo?a=b_c&d=%20%2F?e&&", "/Echo?a=b_c&d=%20%2F?e&&"),
        ("/echo?", "/Echo?"),
        ("/prpc/echo_it", "/prpc/EchoIt"),
        ("/a_b/echo", "/a_b/Echo"),
    ],
)
async def test_only_the_last_segment_is_spelled_anew(
    tmp_path: Path, kind: str, target: str, came: str
) -> None:
    async with recording(tmp_path, kind) as (alone, agent):
        await ask(alone, target)
        assert agent.requests[-1].target == came


# Header, body and status.


async def test_the_query_is_an_argument(one: Mesh) -> None:
    answer = await ask(one, "/get_quote?report_data=abcdef")
    assert json.loads(answer.body)["report_data"].startswith("abcdef00")


async def test_json_is_an_argument(one: Mesh) -> None:
    body = json.dumps({"report_data": "123456"}).encode()
    answer = await ask(one, "/get_quote", "POST", [JSON], body)
    assert answer.status == 200
    assert json.loads(answer.body)["report_data"].startswith("12345600")


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_header_and_body_are_kept(tmp_path: Path, kind: str) -> None:
    body = b'{"a": "\xc3\xa9"}'
    fields = [
        ("Host", "dstack-mesh"),
        ("content-type", "application/json; charset=utf-8"),
        ("X-Own", "caf\xe9"),
        ("Accept", "*/*"),
    ]
    async with recording(tmp_path, kind) as (alone, agent):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            answer = await ask(alone, "/echo", method, fields, body)
            came = json.loads(answer.body)
            assert came["method"] == method
            assert came["headers"] == [
                list(field) for field in [*fields, ("Content-Length", str(len(body)))]
            ]
            assert came["body_sha256"] == hashlib.sha256(body).hexdigest()
        assert agent.connections == 1, "the connection is kept"


async def test_an_error_is_passed_on_as_it_is(one: Mesh) -> None:
    """Status 400 with the agent's own JSON: not a mesh's answer."""
    answer = await ask(one, "/no_such_call")
    assert (answer.status, answer.error) == (400, "")
    assert answer.get(b"content-type") == b"application/json"
    assert json.loads(answer.body) == {"error": "Service not found: NoSuchCall"}
    too_long = await ask(one, f"/get_quote?report_data={'00' * 65}")
    assert (too_long.status, too_long.error) == (400, "")
    assert json.loads(too_long.body) == {"error": "Report data is too long"}


async def test_a_page_that_is_no_json_is_passed_on(one: Mesh) -> None:
    answer = await ask(one, "/a/b")
    assert (answer.status, answer.error) == (404, "")
    assert answer.get(b"content-type") != b"application/json"


async def test_an_agent_cannot_speak_in_the_meshs_name(tmp_path: Path) -> None:
    forged = b"HTTP/1.1 200 OK\r\nX-Dstack-Mesh-Error: tls_failed\r\nContent-Length: 2\r\n\r\nok"
    async with (
        origin(answers(forged)) as (_, address),
        standing_in(tmp_path, address) as alone,
    ):
        answer = await ask(alone, "/info")
        assert (answer.status, answer.error, answer.body) == (200, "", b"ok")


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_big_body_up(tmp_path: Path, kind: str, chunked: bool) -> None:
    body = bytes(range(256)) * (20 * MIB // 256)
    async with recording(tmp_path, kind) as (alone, _):
        async with Client.connect(alone.outbound("a")) as client:
            if chunked:
                await client.send(request("POST", "/upload", [("Transfer-Encoding", "chunked")]))
                await client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            else:
                await client.send(request("POST", "/upload", body=body))
            answer = await client.answer("POST")
        came = json.loads(answer.body)
        assert came["bytes"] == len(body)
        assert came["sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_big_body_down(tmp_path: Path, kind: str) -> None:
    async with recording(tmp_path, kind) as (alone, _):
        answer = await ask(alone, f"/download?bytes={20 * MIB}")
        assert len(answer.body) == 20 * MIB


async def test_bodies_stream_both_ways(tmp_path: Path) -> None:
    """A part of the request is there before the rest is sent, and so is a part of the answer."""
    part_came = asyncio.Event()

    async def serve(wire: Wire) -> None:
        await wire.head()
        await wire.until(b"first")
        part_came.set()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nearly")
        await wire.until(b"second")
        await wire.send(b"-later")
        await wire.to_end()

    async with (
        origin(serve) as (_, address),
        standing_in(tmp_path, address) as alone,
        Client.connect(alone.outbound("a")) as client,
    ):
        await client.send(request("POST", "/attest", [("Content-Length", "11")]) + b"first")
        await asyncio.wait_for(part_came.wait(), 20)
        await client.until(b"early")
        await client.send(b"second")
        assert await client.until(b"-later") == b"-later"


# What is offered.


@pytest.mark.parametrize("path", ["/info", "/Info", "/INFO", "/version", "/Version?x=y"])
async def test_expose_info_offers_two_calls(tmp_path: Path, path: str) -> None:
    async with mesh(tmp_path, ["a"]) as one:
        await one.start("a", backend=False, MESH_AGENT_EXPOSE="info")
        assert (await ask(one, path)).status == 200


@pytest.mark.parametrize(
    ("expose", "paths"),
    [
        (
            "info",
            [
                "/get_quote",
                "/GetKey?path=x",
                "/get_tls_key",
                "/",
                "/prpc/Info",
                "/x/info",
                "//info",
                "/info/",
                "/info%2f..%2fGetKey",
                "/health_",
                "*",
            ],
        ),
        ("none", ["/info", "/Info", "/version", "/get_quote", "/"]),
    ],
)
async def test_other_calls_are_denied(tmp_path: Path, expose: str, paths: list[str]) -> None:
    """Not one of them reaches the agent, and the connection stays."""
    async with mesh(tmp_path) as one:
        await one.start("b")
        await one.start("a", backend=False, MESH_AGENT_EXPOSE=expose)
        before = agent_of(one).calls.copy()
        async with Client.connect(one.outbound("a")) as client:
            for path in paths:
                method = "OPTIONS" if path == "*" else "POST"
                await client.send(request(method, path))
                fields = problem(await client.answer(method), "agent_denied", 403)
                assert "MESH_AGENT_EXPOSE" in str(fields["detail"])
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200
            await client.send(request("GET", "/gateway"))
            assert (await client.answer()).status == 200
            await client.send(request("GET", "/", [("x-dstack-target-app", one.app_id("b"))]))
            assert (await client.answer()).body == b"hello\n"
        assert agent_of(one).calls == before


# The mesh's own paths.


@pytest.mark.parametrize("path", ["/health", "/health?x=y"])
async def test_health_is_the_meshs_own(one: Mesh, path: str) -> None:
    answer = await ask(one, path)
    assert (answer.status, answer.error) == (200, "")
    head = await ask(one, path, "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.get(b"content-length") == str(len(answer.body)).encode()
    assert agent_of(one).calls["Health"] == 0


async def test_health_by_another_method_is_the_agents(one: Mesh) -> None:
    answer = await ask(one, "/health", "POST", [JSON], b"{}")
    assert answer.status == 400
    assert json.loads(answer.body) == {"error": "Service not found: Health"}
    assert agent_of(one).calls["Health"] == 1


async def test_health_with_a_target_is_the_targets(pair: Mesh) -> None:
    """Which its mesh answers, by GET and HEAD; other methods are its backend's."""
    async with Client.connect(pair.outbound("a")) as client:
        target = ("x-dstack-target-app", pair.app_id("b"))
        await client.send(request("GET", "/health", [target]))
        assert (await client.answer()).status == 200
        assert not pair.backends["b"].requests
        await client.send(request("POST", "/health", [target]))
        assert (await client.answer("POST")).status == 404
        assert pair.backends["b"].requests[-1].target == "/health"


async def test_gateway_tells_the_domain(one: Mesh) -> None:
    answer = await ask(one, "/gateway")
    assert (answer.status, answer.get(b"content-type")) == (200, b"application/json")
    domain = f"{one.world.gateway.base_domain}:{one.world.gateway.address.port}"
    assert json.loads(answer.body) == {"gateway_domain": domain}
    head = await ask(one, "/gateway?x", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert agent_of(one).calls["Gateway"] == 0


# Absent.


async def test_an_agent_that_goes_away_and_comes_back(one: Mesh) -> None:
    agent, address = agent_of(one), one.sidecars["a"].settings.dstack.agent
    async with Client.connect(one.outbound("a")) as client:
        for _ in range(2):
            await client.send(request("GET", "/info"))
            assert (await client.answer()).status == 200
            await agent.aclose()
            await client.send(request("GET", "/info"))
            fields = problem(await client.answer(), "agent_unavailable", 502)
            assert str(address) in str(fields["detail"])
            problem(await ask(one, "/info", "POST", [JSON], b"{}"), "agent_unavailable", 502)
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200
            await agent.start(address)
        await client.send(request("GET", "/info"))
        assert (await client.answer()).status == 200


async def test_an_agent_that_drops_its_connections(one: Mesh) -> None:
    """A call that may be repeated is; the next one works in any case."""
    agent = agent_of(one)
    assert (await ask(one, "/info")).status == 200
    agent.drop_connections()
    assert (await ask(one, "/info")).status == 200


async def test_calls_are_served_while_there_is_no_identity_yet(tmp_path: Path) -> None:
    async with mesh(tmp_path, ["a"]) as alone:
        agent = alone.app("a").agent
        agent.fail_next(1)
        await alone.start_closed("a", MESH_OUTBOUND_LISTEN="127.0.0.1:0")
        await eventually(lambda: agent.calls["GetTlsKey"] >= 1)
        assert (await ask(alone, "/info")).status == 200
        target = [("x-dstack-target-app", "0" * 40)]
        problem(await ask(alone, "/", headers=target), "identity_unavailable", 503)

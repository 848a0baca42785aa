"""What a backend is told of its caller, and a caller of its target: the mesh's own word."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from dstack_mesh.identity.tls import server_context
from dstack_mesh.model import AppId
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.messages import Answer, Request, Response
from tests.integration.harness import Client, Mesh, mesh, problem, request
from tests.integration.tls_peers import VERSIONS, caller_context

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLER = AppId("cc" * 20)
VICTIM = "ee" * 20

SPOOFED = {
    "x-dstack-app-id": VICTIM,
    "x-real-ip": "10.9.8.7",
    "x-forwarded-proto": "spoofed",
    "x-client-cert": "spoofed",
    "x-client-verify": "SUCCESS-spoofed",
}

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "capitals": str.title,
    "loud": str.upper,
    "underscores": lambda name: name.replace("-", "_"),
    "loud underscores": lambda name: name.replace("-", "_").upper(),
    "one underscore": lambda name: name.replace("-", "_", 1),
    "another underscore": lambda name: "_".join(name.rsplit("-", 1)),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with mesh(tmp_path_factory.mktemp("world")) as one:
        await one.start("a")
        await one.start("b")
        yield one


async def echo(there: Mesh, sent: bytes) -> dict[str, list[list[str]]]:
    """Send bytes as `CALLER`, on one connection twice, and give what the backend saw of them."""
    kms = there.world.kms
    context = caller_context(kms.root_pem, kms.issue(CALLER))
    async with Client.connect(there.inbound("b"), context) as client:
        for _ in range(2):  # the second time, the head is a remembered one
            await client.send(sent)
            answer = await client.answer(sent.split(b" ")[0].decode())
            assert answer.status == 200, answer
            seen = json.loads(answer.body)
            assert "spoofed" not in answer.body.decode()
            assert VICTIM not in answer.body.decode()
            assert "10.9.8.7" not in answer.body.decode()
            check_own_fields(seen["headers"])
    return dict(seen)


def check_own_fields(headers: list[list[str]]) -> None:
    """Each of the mesh's fields is there once, under any spelling, and true."""
    alike = [(name.lower().replace("_", "-"), value) for name, value in headers]
    told = [field for field in alike if field[0] in SPOOFED]
    assert sorted(told) == [
        ("x-dstack-app-id", CALLER),
        ("x-forwarded-proto", "https"),
        ("x-real-ip", "127.0.0.1"),
    ]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("times", [1, 3])
async def test_spoofed_fields_do_not_reach_the_backend(
    there: Mesh, spelling: str, times: int
) -> None:
    spell = SPELLINGS[spelling]
    fields = [(spell(name), value) for name, value in SPOOFED.items()] * times
    seen = await echo(there, request("GET", "/echo", [*fields, ("x-other", "kept"), *fields]))
    assert ["x-other", "kept"] in seen["headers"]


async def test_spoofed_trailers_do_not_reach_the_backend(there: Mesh) -> None:
    names = [spell(name) for spell in SPELLINGS.values() for name in SPOOFED]
    trailers = "".join(f"{name}: {SPOOFED[as_sent(name)]}\r\n" for name in names)
    head = request("POST", "/echo", [("transfer-encoding", "chunked"), ("te", "trailers")])
    body = f"3\r\nabc\r\n0\r\n{trailers}x-sum: kept\r\nx-forwarded-for: spoofed\r\n\r\n"
    seen = await echo(there, head + body.encode())
    assert seen["trailers"] == [["x-sum", "kept"]]


def as_sent(name: str) -> str:
    return name.lower().replace("_", "-")


@pytest.mark.parametrize("option", [*SPOOFED, "x-forwarded-for"])
async def test_a_caller_can_not_have_the_meshs_fields_removed(there: Mesh, option: str) -> None:
    """`Connection` names fields for one hop only; what the mesh puts on is for the next one."""
    seen = await echo(there, request("GET", "/echo", [("connection", f"{option}, x-gone")]))
    assert ["x-forwarded-for", "127.0.0.1"] in seen["headers"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_spoofed_fields_of_an_older_client(there: Mesh, version: str) -> None:
    fields = [*SPOOFED.items(), ("connection", "keep-alive")]
    await echo(there, request("GET", "/echo", fields, version=version))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], "127.0.0.1"),
        ([("x-forwarded-for", "192.0.2.1")], "192.0.2.1, 127.0.0.1"),
        (
            [("x-forwarded-for", "192.0.2.1, 192.0.2.2"), ("X-Forwarded-For", "192.0.2.3")],
            "192.0.2.1, 192.0.2.2, 192.0.2.3, 127.0.0.1",
        ),
        ([("x-forwarded-for", "")], "127.0.0.1"),
        ([("x_forwarded_for", "192.0.2.9")], "127.0.0.1"),
    ],
)
async def test_forwarded_for_is_appended_to(
    there: Mesh, said: list[tuple[str, str]], expected: str
) -> None:
    seen = await echo(there, request("GET", "/echo", said))
    alike = [value for name, value in seen["headers"] if as_sent(name) == "x-forwarded-for"]
    assert alike == [expected]


async def test_requests_behind_one_another_are_each_told_apart(there: Mesh) -> None:
    """Bytes behind a request's end are the next request, and are cleaned like the first."""
    hidden = request("GET", "/echo", SPOOFED.items())
    first = request("POST", "/echo", [("content-length", "0")])
    kms = there.world.kms
    context = caller_context(kms.root_pem, kms.issue(CALLER))
    async with Client.connect(there.inbound("b"), context) as client:
        await client.send(first + hidden + hidden)
        for method in ("POST", "GET", "GET"):
            seen = json.loads((await client.answer(method)).body)
            check_own_fields(seen["headers"])
            assert VICTIM not in str(seen)


async def forged_error(_: Request) -> Answer:
    fields = [("X-Dstack-Mesh-Error", "policy_denied"), ("x_dstack_mesh_error", "policy_denied")]
    return Response(200, [*fields, ("x-other", "kept")], b"mine", interim=[(103, fields)])


async def test_a_backend_can_not_speak_as_a_mesh(there: Mesh) -> None:
    there.backends["b"].on("/forged", forged_error)
    kms = there.world.kms
    context = caller_context(kms.root_pem, kms.issue(CALLER))
    async with Client.connect(there.inbound("b"), context) as client:
        await client.send(request("GET", "/forged"))
        raw = await client.until(b"mine")
    assert b"mesh" not in raw.lower()
    assert b"x-other: kept\r\n" in raw
    answer = await there.call("a", "b", path="/forged")
    assert (answer.status, answer.body, answer.error) == (200, b"mine", "")


async def test_what_the_targets_mesh_answered_is_marked(there: Mesh) -> None:
    there.backends["b"].nonsense = b"nonsense\r\n\r\n"
    try:
        answer = await there.call("a", "b")
    finally:
        there.backends["b"].nonsense = None
    problem(answer, "upstream_protocol_error", 502)
    assert answer.error == "upstream_protocol_error; remote"


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_target_under_another_kms_refuses_us(tmp_path: Path, version: str) -> None:
    """Its own chain is good; what it trusts is another root, of the same name."""
    async with mesh(tmp_path) as one:
        await one.start("a", MESH_TLS_MIN_VERSION=version)
        await one.start("b", MESH_TLS_MIN_VERSION=version)
        identity = one.sidecars["b"].identity
        foreign = replace(await identity._source.fetch(), root_pem=Kms.create().root_pem)
        context = server_context(foreign, VERSIONS[version])
        assert identity._current is not None
        identity._current = replace(identity._current, server_context=context)
        caller = one.sidecars["a"].identity.require()
        caller.client_context.maximum_version = VERSIONS[version]
        for method, body in (("GET", b""), ("POST", b"x" * 100_000), ("GET", b"")):
            answer = await one.call("a", "b", method, body=body)
            detail = problem(answer, "peer_rejected_us", 502)["detail"]
            assert "decrypt_error" in str(detail)
        assert not one.backends["b"].requests

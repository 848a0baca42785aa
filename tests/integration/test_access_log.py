"""The access log and denials of sidecars as processes: what a reader of their logs finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Request, Response
from dstack_mesh.sim.world import World
from tests.integration.harness import Answer, Client, request
from tests.integration.processes import SidecarProcess, sidecar_process

FREE = "127.0.0.1:0"
SECRET = "s3cret-0f-a-reader"


class Two:
    """App `a` calls app `b`, each with a process; both logs are read."""

    def __init__(self, world: World, a: SidecarProcess, b: SidecarProcess) -> None:
        self.world, self.a, self.b = world, a, b

    async def call(self, *headers: tuple[str, str], path: str = "/", body: bytes = b"") -> Answer:
        target = ("x-dstack-target-app", self.world.apps["b"].app_id)
        async with Client.connect(self.a.address("outbound")) as client:
            await client.send(request("POST", path, [target, *headers], body))
            return await client.answer()


def events(running: SidecarProcess, name: str) -> list[dict[str, Any]]:
    return [line for line in running.log if line["event"] == name]


async def some(running: SidecarProcess, name: str, count: int) -> list[dict[str, Any]]:
    """Wait for so many events."""
    async with asyncio.timeout(20):
        while len(found := events(running, name)) < count:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
    assert len(found) == count
    return found


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    one = Backend("b")
    yield one
    await one.aclose()


@pytest.fixture
async def two(tmp_path: Path, backend: Backend) -> AsyncIterator[Two]:
    async with World(["a", "b"], tmp_path) as world:
        a, b = world.apps["a"], world.apps["b"]
        common = {"MESH_OUTBOUND_LISTEN": FREE, "MESH_ACCESS_LOG": "all"}
        served = {"MESH_BACKEND": str(await backend.start())}
        async with (
            sidecar_process(a.directory, {**a.env, **common}) as one,
            sidecar_process(b.directory, {**b.env, **common, **served}) as other,
        ):
            yield Two(world, one, other)


async def test_an_exchange_is_one_event_on_either_side_and_no_secret_is_in_it(
    two: Two, backend: Backend
) -> None:
    async def slow(received: Request) -> Response:
        await received.read()
        await asyncio.sleep(0.05)
        return Response(201, [("Set-Cookie", SECRET)], SECRET.encode())

    backend.on("/orders", slow)
    secrets = (
        ("Authorization", f"Bearer {SECRET}"),
        ("Cookie", f"session={SECRET}"),
        ("x-request-id", "night-7"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    )
    for _ in range(2):
        answer = await two.call(*secrets, path=f"/orders?token={SECRET}", body=SECRET.encode())
        assert answer.status == 201
    outbound = await some(two.a, "access", 2)
    inbound = await some(two.b, "access", 2)

    assert [one["reused"] for one in outbound] == [False, True]
    assert outbound[0]["connect_seconds"] > 0
    assert outbound[1]["connect_seconds"] is None
    for one, direction, peer in (
        (outbound[0], "outbound", two.world.apps["b"].app_id),
        (inbound[0], "inbound", two.world.apps["a"].app_id),
    ):
        assert (one["direction"], one["peer"]) == (direction, peer)
        assert (one["method"], one["path"], one["status"]) == ("POST", "/orders", 201)
        assert (one["code"], one["request_id"]) == ("", "night-7")
        assert one["bytes_up"] == len(SECRET)
        assert one["bytes_down"] > len(SECRET)
        assert 0.05 <= one["first_byte_seconds"] <= one["seconds"] < 5
    for running in (two.a, two.b):
        assert SECRET not in json.dumps(running.log)

    seen = dict(backend.requests[0].headers)
    assert seen["x-request-id"] == "night-7"
    assert seen["traceparent"] == secrets[3][1], "tracing goes through as it came"


async def test_without_an_id_answer_and_log_name_one_and_the_request_gets_none(
    two: Two, backend: Backend
) -> None:
    await two.call()
    assert "x-request-id" not in {name.lower() for name, _ in backend.requests[0].headers}
    (well,) = await some(two.a, "access", 1)
    assert len(well["request_id"]) == 32
    async with Client.connect(two.a.address("outbound")) as client:
        await client.send(request("GET", "/", [("x-dstack-target-app", "nobody")]))
        problem = json.loads((await client.answer()).body)
    failed = (await some(two.a, "access", 2))[1]
    assert (failed["code"], failed["request_id"]) == ("bad_target", problem["request_id"])


async def test_an_answer_that_breaks_off_is_told(two: Two, backend: Backend) -> None:
    async def breaks(_: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"half"
            raise ConnectionResetError

        return Response(200, [("content-length", "8")], body())

    backend.on("/half", breaks)
    with pytest.raises(Exception):  # noqa: B017 - what a reader makes of half an answer is its own
        await two.call(path="/half")
    (one,) = await some(two.b, "access", 1)
    assert (one["status"], one["code"]) == (200, "upstream_closed")
    (other,) = await some(two.a, "access", 1)
    assert (other["status"], other["code"]) == (200, "upstream_closed")


async def test_denials_are_logged_with_the_access_log_off(tmp_path: Path) -> None:
    async with World(["a", "b"], tmp_path) as world:
        a, b = world.apps["a"], world.apps["b"]
        asks = {"MESH_OUTBOUND_LISTEN": FREE, "MESH_AGENT_EXPOSE": "none"}
        served = {"MESH_BACKEND": "127.0.0.1:9", "MESH_ALLOWED_APPS": "self"}
        async with (
            sidecar_process(a.directory, {**a.env, **asks}) as one,
            sidecar_process(b.directory, {**b.env, **served}) as other,
        ):
            answer = await Two(world, one, other).call(("x-request-id", "r-1"), path="/pay?x=1")
            assert answer.status == 403
            (denied,) = await some(other, "policy_denied", 1)
            assert (denied["caller"], denied["path"]) == (a.app_id, "/pay")
            assert denied["request_id"] == "r-1"
            assert a.app_id in denied["why"]
            assert events(other, "access") == []

            async with Client.connect(one.address("outbound")) as client:
                for number in range(25):
                    await client.send(request("GET", "/quote", [("x-request-id", f"q-{number}")]))
                    assert (await client.answer()).error == "agent_denied"
            asked = await some(one, "request_denied", 10)
            assert [found["request_id"] for found in asked] == [f"q-{n}" for n in range(10)]
            assert {(found["direction"], found["code"]) for found in asked} == {
                ("agent", "agent_denied")
            }
            (left_out,) = await asyncio.wait_for(some(one, "events_left_out", 1), 20)
            assert (left_out["of"], left_out["count"]) == ("request_denied", 15)

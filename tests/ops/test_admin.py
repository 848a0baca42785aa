from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine

import pytest

from dstack_mesh.errors import BadRequest
from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.ops.admin import Admin, is_loopback
from dstack_mesh.ops.readiness import Readiness
from dstack_mesh.relay.answers import Answer
from dstack_mesh.wire.request import parse_request_line


class State:
    """What the checks find; each may be changed."""

    def __init__(self) -> None:
        self.identity = self.gateway = self.backend = True
        self.draining = False
        self.backend_asked = 0

    async def ask_backend(self) -> tuple[bool, str]:
        self.backend_asked += 1
        return self.backend, "the backend"

    def admin(self) -> Admin:
        readiness = Readiness(
            identity=lambda: (self.identity, "the identity"),
            gateway=lambda: (self.gateway, "the gateway"),
            backend=self.ask_backend,
            draining=lambda: self.draining,
        )
        return Admin(readiness, lambda: "dstack_mesh_build_info 1\n")


@pytest.fixture
def state() -> State:
    return State()


async def ask(admin: Admin, path: str, method: str = "GET", fields: str = "Host: x\r\n") -> Answer:
    line = parse_request_line(f"{method} {path} HTTP/1.1".encode())
    answer = admin.route(line, admin.plan(line, fields.encode()))
    if isinstance(answer, Coroutine):
        answer = await answer
    assert isinstance(answer, Answer)
    return answer


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_livez_is_there_whatever_is_missing(state: State, method: str) -> None:
    state.identity = state.gateway = state.backend = False
    state.draining = True
    assert (await ask(state.admin(), "/livez", method)).status == 200


async def test_readyz_says_what_is_there(state: State) -> None:
    answer = await ask(state.admin(), "/readyz")
    assert answer.status == 200
    assert b"Content-Type: application/json\r\n" in answer.fields
    assert json.loads(answer.body) == {
        "ready": True,
        "checks": {
            "identity": {"ok": True, "reason": "the identity"},
            "gateway": {"ok": True, "reason": "the gateway"},
        },
    }


@pytest.mark.parametrize("missing", ["identity", "gateway"])
@pytest.mark.parametrize("path", ["/readyz", "/readyz/inbound", "/readyz?verbose"])
async def test_readyz_says_what_is_missing(state: State, missing: str, path: str) -> None:
    setattr(state, missing, False)
    answer = await ask(state.admin(), path)
    assert answer.status == 503
    report = json.loads(answer.body)
    assert not report["ready"]
    assert [name for name, check in report["checks"].items() if not check["ok"]] == [missing]


async def test_the_backend_is_missed_only_where_it_is_asked_for(state: State) -> None:
    state.backend = False
    admin = state.admin()
    assert (await ask(admin, "/readyz")).status == 200
    assert state.backend_asked == 0, "it may be waiting for the mesh"
    answer = await ask(admin, "/readyz/inbound")
    assert answer.status == 503
    assert json.loads(answer.body)["checks"]["backend"] == {"ok": False, "reason": "the backend"}
    state.backend = True
    assert (await ask(admin, "/readyz/inbound")).status == 200


async def test_a_mesh_that_stops_is_not_ready(state: State) -> None:
    admin = state.admin()
    assert (await ask(admin, "/readyz")).status == 200
    state.draining = True
    assert (await ask(admin, "/readyz")).status == 503


async def test_metrics(state: State) -> None:
    answer = await ask(state.admin(), "/metrics")
    assert (answer.status, answer.body) == (200, b"dstack_mesh_build_info 1\n")
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in answer.fields


@pytest.mark.parametrize("path", ["/readyz/", "/livez/x", "/LIVEZ", "/%6civez", "/nothing"])
async def test_other_paths_are_not_found(state: State, path: str) -> None:
    answer = await ask(state.admin(), path)
    assert answer.status == 404
    assert b"/livez" in answer.body, "it says what is there"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
async def test_nothing_can_be_changed(state: State, method: str, path: str) -> None:
    answer = await ask(state.admin(), path, method)
    assert answer.status == 405
    assert b"Allow: GET, HEAD\r\n" in answer.fields


async def test_a_request_is_held_to_http(state: State) -> None:
    with pytest.raises(BadRequest):
        await ask(state.admin(), "/livez", fields="Host: x\r\nHost: y\r\n")


async def test_connections_persist(state: State) -> None:
    admin = state.admin()
    admin.connected(asyncio.Transport())
    assert admin.may_persist()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (TcpAddress("127.0.0.1", 1), True),
        (TcpAddress("127.9.9.9", 1), True),
        (TcpAddress("::1", 1), True),
        (TcpAddress("localhost", 1), True),
        (UnixAddress("/run/admin.sock"), True),
        (TcpAddress("0.0.0.0", 1), False),
        (TcpAddress("::", 1), False),
        (TcpAddress("10.0.0.1", 1), False),
        (TcpAddress("admin.example", 1), False),
        (TcpAddress("localhost.example", 1), False),
        (TcpAddress("", 1), False),
    ],
)
def test_what_only_this_machine_reaches(address: Address, expected: bool) -> None:
    assert is_loopback(address) is expected

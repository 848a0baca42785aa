"""`policy explain` and a mesh that runs decide alike, for arbitrary rules, routes and requests."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.identities import FakeIdentity, snapshot_of
from tests.policy.cases import APP_LISTS, CALLERS, OWN, REQUESTS, rules

from dstack_mesh.cli import main
from dstack_mesh.errors import MeshError
from dstack_mesh.inbound.auth_service import AuthService
from dstack_mesh.inbound.compiled import compile_inbound
from dstack_mesh.inbound.terminator import InboundOptions, Terminator
from dstack_mesh.model import PeerIdentity, Role, TcpAddress
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.route import Route
from dstack_mesh.policy.rule import INFO_CONDITIONS, Rule
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.dial import PlainConnector
from dstack_mesh.relay.lane import Route as UpstreamRoute
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.worker import Worker
from dstack_mesh.settings.load import load_settings
from dstack_mesh.settings.rules import toml_lines
from dstack_mesh.sim.kms import Kms
from dstack_mesh.wire.request_line import parse_request_line

OURS = snapshot_of(Kms.create(b"explain"), OWN)
BACKEND = TcpAddress("127.0.0.1", 1)

ROUTES = st.lists(
    st.builds(
        Route,
        st.sampled_from([TcpAddress("b", 2), TcpAddress("c", 3)]),
        st.none() | st.sampled_from(["one", "two"]),
        st.sampled_from(["/**", "/a", "/a/*", "/b*"]),
    ),
    max_size=2,
).map(tuple)


@dataclass
class Asked:
    """One caller's request to a mesh of these settings."""

    allow: str
    mode: str
    rules: tuple[Rule, ...]
    routes: tuple[Route, ...]
    caller: PeerIdentity
    method: str
    path: str
    host: str

    def write(self, file: Path) -> None:
        lines = ["[inbound]", f'backend = "{BACKEND}"', f'allow = "{self.allow}"']
        lines.append(f'policy_mode = "{self.mode}"')
        lines += toml_lines("inbound.rule", self.rules, "x")
        lines += toml_lines("inbound.route", self.routes, "x")
        file.write_text("\n".join(lines))

    def explained(self, file: Path) -> dict[str, Any]:
        """Ask the command."""
        args = ["--app", self.caller.app_id, "--own-app", OWN, "--json"]
        args += ["--method", self.method, "--path", self.path, "--host", self.host]
        for name in INFO_CONDITIONS:
            value = getattr(self.caller.app_info, name, "")
            args += [f"--{name.replace('_', '-')}", value] if value else []
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            status = main(["policy", "explain", "-c", str(file), *args])
        found: dict[str, Any] = json.loads(out.getvalue())
        assert status == (0 if found["allowed"] else 1)
        return found


@st.composite
def asked(draw: st.DrawFn, routed: bool = True) -> Asked:
    method, path = draw(REQUESTS)
    if path == "*":
        method = "OPTIONS"
    return Asked(
        draw(APP_LISTS),
        draw(st.sampled_from(["enforce", "enforce", "audit"])),
        draw(rules()),
        draw(ROUTES) if routed else (),
        draw(CALLERS),
        method,
        path,
        draw(st.sampled_from(["one", "two:80", "x"])),
    )


class Peers:
    def __init__(self, found: PeerIdentity) -> None:
        self._found = found

    def identify(self, ssl_object: object, role: Role) -> PeerIdentity:
        return self._found


class Leaves(Peers):
    def identify(self, escaped: bytes) -> PeerIdentity:  # type: ignore[override]
        return self._found


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    one = asyncio.new_event_loop()
    yield one
    one.close()


RARELY_SLOW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@RARELY_SLOW
@given(asked())
def test_the_terminator(loop: asyncio.AbstractEventLoop, tmp_path: Path, one: Asked) -> None:
    file = tmp_path / "mesh.toml"
    one.write(file)
    explained = one.explained(file)
    current = Current(*compile_inbound(load_settings({}, {}, file).settings.inbound))
    decisions: list[str] = []
    worker = Worker(loop, Timeouts())
    options = InboundOptions(BACKEND, current, 1.0)
    terminator = Terminator(Pool(worker), FakeIdentity(OURS), options, decisions.append)  # type: ignore[arg-type]
    caller = terminator.handler(replace(OURS, peers=Peers(one.caller)))
    caller.connected(asyncio.Transport({"peername": ("192.0.2.1", 1)}))
    line = parse_request_line(f"{one.method} {one.path} HTTP/1.1".encode())
    plan = caller.plan(line, f"Host: {one.host}\r\n".encode())
    for _ in range(2):  # the second time much is remembered
        if explained["allowed"]:
            route = caller.route(line, plan)
            assert isinstance(route, UpstreamRoute)
            assert isinstance(route.lane.connector, PlainConnector)
            assert explained["backend"] == str(route.lane.connector._address)
        else:
            with pytest.raises(MeshError) as caught:
                caller.route(line, plan)
            assert caught.value.code == explained["code"]
            assert caught.value.detail == explained["why"]
    first, second = decisions
    assert first == second
    assert first == explained["decision"] or explained["code"] == "bad_request"
    worker.close()


@RARELY_SLOW
@given(asked(routed=False))
def test_the_auth_service(tmp_path: Path, one: Asked) -> None:
    file = tmp_path / "mesh.toml"
    one.write(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESH_INBOUND_MODE", "nginx")
        explained = one.explained(file)
    current = Current(*compile_inbound(load_settings({}, {}, file).settings.inbound))
    decisions: list[str] = []
    leaves: Any = Leaves(one.caller)
    service = AuthService(FakeIdentity(OURS), current, decisions.append, leaves)
    line = parse_request_line(b"GET /auth HTTP/1.1")
    block = (
        "Host: x\r\nx-client-verify: SUCCESS\r\nx-client-cert: x\r\n"
        f"x-original-method: {one.method}\r\nx-original-uri: {one.path}\r\n"
    )
    answer = service.route(line, service.plan(line, block.encode()))
    assert isinstance(answer, Answer)
    assert answer.status == (200 if explained["allowed"] else 403)
    assert answer.code == (explained["code"] or "")
    assert decisions == [explained["decision"]]
    if answer.status != 200:
        assert json.loads(answer.body)["detail"] == explained["why"]

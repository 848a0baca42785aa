from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from tests.identities import APP_A, APP_B, FakeIdentity, snapshot_of

from dstack_mesh.errors import (
    BadRequest,
    ClientCertRequired,
    ClientCertUntrusted,
    MeshError,
    PolicyDenied,
)
from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.inbound.terminator import Caller, InboundOptions, Terminator
from dstack_mesh.model import Address, PeerIdentity, Role, TcpAddress, UnixAddress
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.decide import Policy
from dstack_mesh.policy.route import NO_ROUTES, Route, Routes
from dstack_mesh.policy.rule import Rule
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.dial import PlainConnector
from dstack_mesh.relay.lane import Route as UpstreamRoute
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.worker import Worker
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.odd import Kind, impostor_chain
from dstack_mesh.wire.request_line import parse_request_line

KMS = Kms.create(b"terminator")
OURS = snapshot_of(KMS, APP_A)
BACKEND = TcpAddress("127.0.0.1", 8080)
VALID = PeerIdentity(APP_B, time.time() + 3600)


class FakePeers:
    """Finds what the test says, whatever was shown."""

    def __init__(self, found: PeerIdentity | Exception | None) -> None:
        self.found = found

    def identify(self, ssl_object: object, role: Role) -> PeerIdentity | None:
        assert role is Role.CALLER
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class FakeTransport(asyncio.Transport):
    def __init__(self, peername: object, ssl_object: object = None) -> None:
        super().__init__({"peername": peername, "ssl_object": ssl_object})


class Rig:
    def __init__(self) -> None:
        self.decisions: list[str] = []
        self.worker = Worker(asyncio.get_running_loop(), Timeouts())
        self.identity = FakeIdentity(OURS)
        self.terminator = self.make()

    def make(self, allow: str = "any", backend: Address = BACKEND) -> Terminator:
        self.policy = Current(Policy(Allow.parse(allow)))
        self.terminator = Terminator(
            Pool(self.worker),
            self.identity,  # type: ignore[arg-type]
            InboundOptions(backend, self.policy, 3.0),
            self.decisions.append,
        )
        return self.terminator

    def caller(
        self,
        found: PeerIdentity | Exception | None = VALID,
        peername: object = ("192.0.2.7", 5000),
    ) -> Caller:
        caller = self.terminator.handler(replace(OURS, peers=FakePeers(found)))
        caller.connected(FakeTransport(peername))
        return caller

    def real_caller(self, client: ssl.SSLContext) -> Caller:
        """Have somebody do a real handshake with us."""
        caller = self.terminator.handler(OURS)
        caller.connected(FakeTransport(("192.0.2.7", 5000), shake_hands(client)))
        return caller


def shake_hands(client: ssl.SSLContext) -> ssl.SSLObject:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = OURS.server_context.wrap_bio(to_server, to_client, server_side=True)
    client_side = client.wrap_bio(to_client, to_server)
    waiting = {client_side, server_side}
    for _ in range(10):
        for one in (client_side, server_side):
            try:
                one.do_handshake()
                waiting.discard(one)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return server_side


def bare_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def ask(
    caller: Caller, line: str, *fields: str, host: str = "Host: x.example"
) -> UpstreamRoute | Answer:
    parsed = parse_request_line(line.encode())
    block = "".join(f"{field}\r\n" for field in (host, *fields) if field).encode("latin-1")
    return caller.route(parsed, caller.plan(parsed, block))


def head(caller: Caller, *fields: str, line: str = "GET /a?b HTTP/1.1", **said: str) -> bytes:
    route = ask(caller, line, *fields, **said)
    assert isinstance(route, UpstreamRoute)
    return route.head


def fails(error: type[MeshError], caller: Caller, line: str = "GET /a HTTP/1.1") -> str:
    with pytest.raises(error) as caught:
        ask(caller, line)
    return caught.value.detail


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    one = Rig()
    yield one
    one.worker.close()


OWN = (
    b"x-forwarded-for: 192.0.2.7\r\nx-forwarded-proto: https\r\nx-real-ip: 192.0.2.7\r\n"
    b"x-dstack-app-id: " + APP_B.encode() + b"\r\n\r\n"
)


async def test_what_the_backend_gets(rig: Rig) -> None:
    caller = rig.caller()
    assert head(caller, "Accept: */*", "Content-Length: 2", line="PUT /a?b HTTP/1.1") == (
        b"PUT /a?b HTTP/1.1\r\nHost: x.example\r\nAccept: */*\r\nContent-Length: 2\r\n" + OWN
    )
    route = ask(caller, "GET / HTTP/1.1")
    assert isinstance(route, UpstreamRoute)
    assert isinstance(route.lane.connector, PlainConnector)
    assert route.lane is rig.terminator.lane
    assert b"x-dstack-app-id" in route.remove_trailers
    assert rig.decisions == ["allow", "allow"]


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        (["X-Forwarded-For: 1.2.3.4"], b"1.2.3.4, 192.0.2.7"),
        (["x-forwarded-for: 1.2.3.4", "X-Forwarded-For: 5.6.7.8"], b"1.2.3.4, 5.6.7.8, 192.0.2.7"),
        (["x-forwarded-for: 1.2.3.4, 5.6.7.8"], b"1.2.3.4, 5.6.7.8, 192.0.2.7"),
        (["x-forwarded-for:"], b"192.0.2.7"),
        (["x_forwarded_for: 6.6.6.6"], b"192.0.2.7"),
    ],
)
async def test_who_it_was_forwarded_for(rig: Rig, said: list[str], sent: bytes) -> None:
    expected = b"GET /a?b HTTP/1.1\r\nHost: x.example\r\nB: c\r\n" + OWN.replace(
        b"for: 192.0.2.7", b"for: " + sent
    )
    for _ in range(2):
        assert head(rig.caller(), *said, "B: c") == expected


@pytest.mark.parametrize(
    "field",
    [
        "x-dstack-app-id: " + APP_A,
        "X-DSTACK-APP-ID: " + APP_A,
        "x_dstack_app_id: " + APP_A,
        "X-Dstack_App-Id: " + APP_A,
        "x-real-ip: 6.6.6.6",
        "X_Real_IP: 6.6.6.6",
        "x-forwarded-proto: http",
        "x-client-cert: pem",
        "X-Client_Verify: SUCCESS",
    ],
)
async def test_what_a_caller_says_of_itself_is_taken_out(rig: Rig, field: str) -> None:
    expected = b"GET /a?b HTTP/1.1\r\nHost: x.example\r\n" + OWN
    assert head(rig.caller(), field) == expected
    assert head(rig.caller(), field, field) == expected
    assert head(rig.caller(), f"Connection: {field.partition(':')[0]}", field) == expected


async def test_our_own_fields_cannot_be_nominated_away(rig: Rig) -> None:
    sent = head(rig.caller(), "Connection: x-dstack-app-id, x-forwarded-for, x-real-ip")
    assert sent == b"GET /a?b HTTP/1.1\r\nHost: x.example\r\n" + OWN


@pytest.mark.parametrize(
    ("peername", "address"),
    [
        (("::ffff:192.0.2.9", 1, 0, 0), b"192.0.2.9"),
        (("2001:db8::1", 1, 0, 0), b"2001:db8::1"),
        ("", b"127.0.0.1"),  # a unix socket's
        (None, b"127.0.0.1"),
    ],
)
async def test_the_callers_address(rig: Rig, peername: object, address: bytes) -> None:
    sent = head(rig.caller(peername=peername))
    assert b"\r\nx-forwarded-for: " + address + b"\r\n" in sent
    assert b"\r\nx-real-ip: " + address + b"\r\n" in sent


@pytest.mark.parametrize(
    ("backend", "expected"),
    [(BACKEND, b"127.0.0.1:8080"), (UnixAddress("/run/b.sock"), b"localhost")],
)
async def test_a_request_without_a_host_gets_the_backends(
    rig: Rig, backend: Address, expected: bytes
) -> None:
    rig.make(backend=backend)
    sent = head(rig.caller(), line="GET / HTTP/1.0", host="")
    assert sent == b"GET / HTTP/1.1\r\nHost: " + expected + b"\r\n" + OWN


async def test_one_callers_identity_is_not_anothers(rig: Rig) -> None:
    """The field lines are understood once for all connections, who sends them is not."""
    first = rig.caller()
    other = rig.caller(PeerIdentity(APP_A, time.time() + 60), peername=("192.0.2.8", 1))
    fields = ("x-forwarded-for: 1.1.1.1", f"x-dstack-app-id: {APP_A}")
    for _ in range(2):
        assert f"x-dstack-app-id: {APP_B}\r\n".encode() in head(first, *fields)
        sent = head(other, *fields)
        assert f"x-dstack-app-id: {APP_A}\r\n".encode() in sent
        assert b"x-forwarded-for: 1.1.1.1, 192.0.2.8\r\n" in sent


# Who is let through


async def test_callers_after_real_handshakes(rig: Rig) -> None:
    assert head(rig.real_caller(snapshot_of(KMS, APP_B).client_context)).endswith(OWN)
    fails(ClientCertRequired, rig.real_caller(bare_context()))
    wrong = bare_context()
    impostor_chain(KMS, Kind.NO_APP_ID, APP_B, APP_A).load_into(wrong)
    fails(ClientCertUntrusted, rig.real_caller(wrong))
    assert rig.decisions == ["allow"], "policy is asked about verified callers only"


async def test_a_broken_rule_is_named(rig: Rig) -> None:
    caller = rig.caller(ChainRuleBroken(2, "the leaf is a CA"))
    assert "the leaf is a CA" in fails(ClientCertUntrusted, caller)


async def test_no_certificate(rig: Rig) -> None:
    assert "x-dstack-target-app" in fails(ClientCertRequired, rig.caller(None))


async def test_a_connection_not_yet_made_is_nobodys(rig: Rig) -> None:
    fails(ClientCertRequired, rig.terminator.handler(OURS))


async def test_an_identity_ends_with_its_certificate(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = rig.caller(PeerIdentity(APP_B, 2_000_000_000.0))
    now = 1_999_999_999.9
    monkeypatch.setattr("dstack_mesh.inbound.terminator.time.time", lambda: now)
    head(caller)
    now = 2_000_000_000.0
    assert "expired" in fails(ClientCertUntrusted, caller)


@pytest.mark.parametrize(
    ("allow", "app", "let"),
    [
        ("any", APP_B, True),
        ("self", APP_A, True),
        ("self", APP_B, False),
        (APP_B, APP_B, True),
        (APP_B, APP_A, False),
        (f"self,{APP_B}", APP_A, True),
    ],
)
async def test_policy(rig: Rig, allow: str, app: str, let: bool) -> None:
    rig.make(allow)
    caller = rig.caller(PeerIdentity(app, time.time() + 60))  # type: ignore[arg-type]
    if let:
        head(caller)
    else:
        detail = fails(PolicyDenied, caller)
        assert app in detail
        assert "MESH_ALLOWED_APPS" in detail
    assert rig.decisions == ["allow" if let else "deny"]


GET_A = Rule("get a", "allow", methods=("GET",), paths=("/a",))


async def test_rules(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.policy.replace(Policy(Allow(anyone=True), (GET_A,)), NO_ROUTES)
    caller = rig.caller()
    head(caller)
    assert "no rule lets it through" in fails(PolicyDenied, caller, "PUT /a HTTP/1.1")
    assert "'/..' is in it" in fails(BadRequest, caller, "GET /b/../a HTTP/1.1")
    head(caller)
    assert caller.rule == "get a"
    assert rig.decisions == ["allow", "deny", "deny", "allow"]
    assert [one.getMessage() for one in caplog.records] == ["policy_denied"] * 2
    assert vars(caplog.records[0])["fields"]["caller"] == APP_B


async def test_audit(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for policy in (
        Policy(Allow(), audit=True),
        Policy(Allow(anyone=True), (GET_A,), audit=True),
        Policy(Allow(anyone=True), (Rule("all", "audit"),)),
    ):
        rig.policy.replace(policy, NO_ROUTES)
        caller = rig.caller()
        for _ in range(2):
            head(caller, line="PUT /b/../a HTTP/1.1")
    assert rig.decisions == ["audit"] * 6
    assert [one.getMessage() for one in caplog.records] == ["policy_audited"] * 6


async def test_another_policy_holds_for_connections_that_are_there(rig: Rig) -> None:
    caller = rig.caller()
    head(caller)
    head(caller)
    rig.policy.replace(Policy(Allow.parse("self")), NO_ROUTES)
    fails(PolicyDenied, caller)
    rig.policy.replace(Policy(Allow(anyone=True), (GET_A,)), NO_ROUTES)
    head(caller)
    fails(PolicyDenied, caller, "GET /b HTTP/1.1")
    rig.policy.replace(Policy(Allow.parse(APP_B)), NO_ROUTES)
    head(caller, line="GET /b HTTP/1.1")
    assert rig.decisions == ["allow", "allow", "deny", "allow", "deny", "allow"]


async def test_only_a_head_that_is_repeated_is_not_decided_anew(rig: Rig) -> None:
    rig.policy.replace(Policy(Allow(anyone=True), (GET_A,)), NO_ROUTES)
    caller = rig.caller()
    block = b"Host: x\r\n"
    good, other = parse_request_line(b"GET /a HTTP/1.1"), parse_request_line(b"GET /b HTTP/1.1")
    plan = caller.plan(good, block)
    for _ in range(3):
        caller.route(good, plan)
        assert caller.rule == "get a"
        with pytest.raises(PolicyDenied):
            caller.route(other, plan)
        assert caller.rule == ""
    caller.route(good, plan)
    rig.policy.replace(Policy(Allow(anyone=True), (replace(GET_A, methods=("PUT",)),)), NO_ROUTES)
    with pytest.raises(PolicyDenied):
        caller.route(good, plan)
    assert rig.decisions == ["allow", "deny"] * 4


async def test_who_is_welcome_is_not_so_for_another_caller(rig: Rig) -> None:
    rig.make(APP_B)
    head(rig.caller())
    fails(PolicyDenied, rig.caller(PeerIdentity(APP_A, time.time() + 60)))


# Which backend


async def test_routes(rig: Rig) -> None:
    one, two = TcpAddress("one", 1), UnixAddress("/two")
    routes = Routes((Route(one, host="x.example", path="/one/**"), Route(two, path="/two")))
    rig.policy.replace(rig.policy.policy, routes)
    caller = rig.caller()
    lanes = {}
    for line in ("GET /one/a HTTP/1.1", "GET /two HTTP/1.1", "GET / HTTP/1.1"):
        found = ask(caller, line)
        assert isinstance(found, UpstreamRoute)
        lanes[line.split()[1]] = found.lane
        again = ask(rig.caller(), line)
        assert isinstance(again, UpstreamRoute)
        assert again.lane is found.lane, "one lane for a backend"
    assert len(set(map(id, lanes.values()))) == 3
    assert lanes["/"] is rig.terminator.lane
    # Without a Host it is the backend's own.
    sent = head(caller, line="GET /two HTTP/1.0", host="")
    assert b"\r\nHost: localhost\r\n" in sent
    detail = fails(BadRequest, caller, "GET /x/../two HTTP/1.1")
    assert "'/..' is in it" in detail
    rig.policy.replace(rig.policy.policy, NO_ROUTES)
    back = ask(caller, "GET /one/a HTTP/1.1")
    assert isinstance(back, UpstreamRoute)
    assert back.lane is lanes["/"]


async def test_a_repeated_head_goes_where_the_routes_in_effect_say(rig: Rig) -> None:
    caller = rig.caller()
    line, block = parse_request_line(b"GET /a HTTP/1.1"), b"Host: x\r\n"
    plan = caller.plan(line, block)
    first = caller.route(line, plan)
    assert isinstance(first, UpstreamRoute)
    assert caller.route(line, plan, first) is first
    rig.policy.replace(rig.policy.policy, Routes((Route(TcpAddress("one", 1), path="/a"),)))
    routed = caller.route(line, plan, first)
    assert isinstance(routed, UpstreamRoute)
    assert routed.lane is not first.lane
    rig.policy.replace(rig.policy.policy, NO_ROUTES)
    back = caller.route(line, plan, routed)
    assert isinstance(back, UpstreamRoute)
    assert back.lane is first.lane
    rig.policy.replace(Policy(Allow()), NO_ROUTES)
    with pytest.raises(PolicyDenied):
        caller.route(line, plan, back)


# Health


@pytest.mark.parametrize("line", ["GET /health HTTP/1.1", "HEAD /health?x HTTP/1.1"])
@pytest.mark.parametrize("found", [None, VALID, ChainRuleBroken(1, "x")])
async def test_health_is_open_to_all(
    rig: Rig, line: str, found: PeerIdentity | Exception | None
) -> None:
    rig.make("self")
    answer = ask(rig.caller(found), line)
    assert isinstance(answer, Answer)
    assert answer.status == 200
    assert rig.decisions == []


@pytest.mark.parametrize(
    "line",
    [
        "POST /health HTTP/1.1",
        "GET /health/ HTTP/1.1",
        "GET /healthz HTTP/1.1",
        "GET /Health HTTP/1.1",
        "GET //health HTTP/1.1",
        "GET /x/../health HTTP/1.1",
    ],
)
async def test_nothing_else_is(rig: Rig, line: str) -> None:
    fails(ClientCertRequired, rig.caller(None), line)


async def test_connections_of_an_older_identity_do_not_persist(rig: Rig) -> None:
    caller = rig.terminator.handler(OURS)
    assert caller.may_persist()
    rig.identity.current = snapshot_of(KMS, APP_A, generation=2)
    assert not caller.may_persist()

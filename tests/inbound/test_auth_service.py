"""What the auth service answers nginx: 200, 401 or 403, and why."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from tests.identities import APP_A, APP_B, FakeIdentity, snapshot_of
from tests.relay.fakes import FakeTransport

from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.escaped_pem import EscapedPemError, parse_escaped_pem
from dstack_mesh.inbound import auth_service
from dstack_mesh.inbound.auth_service import AuthService, KnownLeaves
from dstack_mesh.model import AppInfo
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.decide import Policy
from dstack_mesh.policy.route import NO_ROUTES
from dstack_mesh.policy.rule import Rule
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.worker import Worker
from dstack_mesh.sim.kms import ROOT_NAME, Kms
from dstack_mesh.sim.odd import Kind, impostor_chain
from dstack_mesh.wire.request_line import parse_request_line

KMS = Kms.create(b"auth service")
OURS = snapshot_of(KMS, APP_A)


def escaped(pem: bytes) -> str:
    return quote(pem, safe="")


GOOD = escaped(KMS.issue(APP_B).leaf_pem)
SUCCESS = "x-client-verify: SUCCESS"


def shown(certificate: str = GOOD) -> tuple[str, str]:
    """Give the fields of a caller that nginx has verified."""
    return SUCCESS, f"x-client-cert: {certificate}"


class Rig:
    """The service with one connection of nginx, in memory."""

    def __init__(self, allow: str = "any", own: bool = True) -> None:
        self.decisions: list[str] = []
        self.records: list[Exchange] = []
        self.identity = FakeIdentity(OURS if own else None)
        self.worker = Worker(asyncio.get_running_loop(), Timeouts())
        self.policy = Current(Policy(Allow.parse(allow)))
        self.service = AuthService(self.identity, self.policy, self.decisions.append)
        self.listener = Service(
            self.worker,
            "inbound",
            max_connections=9,
            record=lambda _, exchange: self.records.append(exchange),
        )
        self.client = self.connect()

    def connect(self) -> FakeTransport:
        downstream = self.listener.protocol(self.service)
        transport = FakeTransport(downstream)
        downstream.connection_made(transport)
        return transport

    def raw(self, data: bytes) -> bytes:
        self.client.receive(data)
        return self.client.take()

    def ask(self, *fields: str, line: str = "GET /auth HTTP/1.1") -> Reply:
        lines = "".join(f"{field}\r\n" for field in ("Host: x", *fields))
        return Reply(self.raw(f"{line}\r\n{lines}\r\n".encode("latin-1")))

    def refused(self, code: str, *fields: str, line: str = "GET /auth HTTP/1.1") -> str:
        """Ask, and have the denial's form checked; give its detail."""
        reply = self.ask(*fields, line=line)
        assert (reply.status, reply.fields["x-dstack-mesh-error"]) == (STATUS[code], code)
        assert reply.fields["content-type"] == "application/problem+json"
        assert "x-dstack-app-id" not in reply.fields
        body: dict[str, Any] = json.loads(reply.body)
        assert (body["code"], body["status"]) == (code, STATUS[code])
        assert json.loads(reply.fields["x-dstack-mesh-problem"]) == body
        return str(body["detail"])

    def app_id(self, *fields: str, line: str = "GET /auth HTTP/1.1") -> str:
        """Ask, and give the app-id that was let through."""
        reply = self.ask(*fields, line=line)
        assert (reply.status, reply.body) == (200, ""), reply.body
        return reply.fields["x-dstack-app-id"]


STATUS = {"client_cert_required": 401, "client_cert_untrusted": 401, "policy_denied": 403}


class Reply:
    """One response, read by hand."""

    def __init__(self, data: bytes) -> None:
        head, _, body = data.decode().partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        self.status = int(first.split(" ")[1])
        self.fields: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            assert name.lower() not in self.fields, "a field is there twice"
            self.fields[name.lower()] = value
        self.body = body


@pytest.fixture
async def rigs() -> AsyncIterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*args: Any, **kw: Any) -> Rig:
        made.append(Rig(*args, **kw))
        return made[-1]

    yield make
    for one in made:
        one.listener.abort()
        one.worker.close()


@pytest.fixture
async def rig(rigs: Callable[..., Rig]) -> Rig:
    return rigs()


# Who is let through.


async def test_a_verified_caller_is_let_through_with_its_app_id(rig: Rig) -> None:
    assert rig.app_id(*shown()) == APP_B
    assert rig.app_id(*shown(escaped(KMS.issue(APP_A).leaf_pem))) == APP_A
    assert rig.app_id(*shown(), line="GET /auth?x=/y HTTP/1.1") == APP_B
    assert rig.ask(*shown(), line="HEAD /auth HTTP/1.1").status == 200
    assert rig.decisions == ["allow"] * 4
    assert [one.status for one in rig.records] == [200] * 4
    assert {one.code for one in rig.records} == {""}


async def test_http_1_0_is_answered_and_its_connection_closed(rig: Rig) -> None:
    reply = rig.ask(*shown(), line="GET /auth HTTP/1.0")
    assert (reply.status, reply.fields["connection"]) == (200, "close")
    rig.client = rig.connect()
    fields = ("Connection: keep-alive", *shown())
    for _ in range(2):
        reply = rig.ask(*fields, line="GET /auth HTTP/1.0")
        assert (reply.status, reply.fields["connection"]) == (200, "keep-alive")


async def test_a_connection_is_kept_through_denials(rig: Rig) -> None:
    for _ in range(3):
        rig.refused("client_cert_required")
        rig.refused("client_cert_untrusted", "x-client-verify: FAILED")
        assert rig.app_id(*shown()) == APP_B
    assert not rig.client.is_closing()


async def test_the_same_value_twice_is_one_value(rig: Rig) -> None:
    assert rig.app_id(*shown(), *shown()) == APP_B


@pytest.mark.parametrize(
    "field",
    [
        "x_client_cert: forged",
        "X_Client_Verify: NONE",
        "x_client-verify: FAILED",
        "x-client-verify-2: NONE",
        "x-dstack-app-id: " + "cc" * 20,
    ],
)
async def test_other_fields_say_nothing(rig: Rig, field: str) -> None:
    assert rig.app_id(field, *shown(), field) == APP_B
    rig.refused("client_cert_required", field)


async def test_look_alikes_are_not_the_real_thing(rig: Rig) -> None:
    rig.refused("client_cert_required", "x_client_verify: SUCCESS", f"x_client_cert: {GOOD}")


# Who is not.


@pytest.mark.parametrize(
    "fields",
    [
        (),
        ("x-client-verify: NONE",),
        ("x-client-verify: NONE", f"x-client-cert: {GOOD}"),
        ("x-client-verify:", "x-client-cert:"),
        (SUCCESS,),
        (SUCCESS, "x-client-cert:"),
    ],
)
async def test_no_certificate(rig: Rig, fields: tuple[str, ...]) -> None:
    rig.refused("client_cert_required", *fields)
    assert rig.decisions == []


async def test_no_certificate_is_told_what_to_do(rig: Rig) -> None:
    assert "x-dstack-target-app" in rig.refused("client_cert_required", "x-client-verify: NONE")


@pytest.mark.parametrize(
    "verdict",
    [
        "FAILED:certificate has expired",
        "FAILED",
        "success",
        "SUCCESS, SUCCESS",
        "SUCCESS SUCCESS",
        "SUCCESS;",
        "SUCCES",
        "none",
        "0",
        "\xe4",
        "x" * 5000,
    ],
)
async def test_any_verdict_but_success_is_a_denial(rig: Rig, verdict: str) -> None:
    detail = rig.refused("client_cert_untrusted", f"x-client-verify: {verdict}", shown()[1])
    assert "SUCCESS is what is accepted" in detail
    assert len(detail) < 300


async def test_a_certificate_without_a_verdict_is_a_denial(rig: Rig) -> None:
    assert "x-client-verify is ''" in rig.refused("client_cert_untrusted", shown()[1])


@pytest.mark.parametrize("name", ["x-client-cert", "x-client-verify", "x-original-uri"])
async def test_two_values_are_a_denial(rig: Rig, name: str) -> None:
    both = (f"{name}: SUCCESS", f"{name.upper()}: other")
    for fields in (both, both[::-1]):
        detail = rig.refused("client_cert_untrusted", *fields, *shown())
        assert f"{name} is there with different values" in detail
    empty = (f"{name}:", *shown(), "x-original-uri: /")
    assert "different values" in rig.refused("client_cert_untrusted", *empty)


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        (KMS.issue(APP_B).leaf_pem.decode().replace("\n", " "), "not percent-encoded"),
        ("garbage", "does not begin with"),
        (GOOD + GOOD, "more than white space behind"),
        (escaped(b"".join(KMS.issue(APP_B).chain_pem)), "more than white space behind"),
        (GOOD.replace("%0A", "%250A"), "does not begin with"),
        (GOOD[:-40], "no -----END"),
        (escaped(KMS.issue(APP_B).key_pem), "does not begin with"),
    ],
)
async def test_what_is_not_one_certificate(rig: Rig, certificate: str, said: str) -> None:
    detail = rig.refused("client_cert_untrusted", *shown(certificate))
    assert said in detail or "not one certificate" in detail
    assert "PRIVATE" not in detail
    assert rig.decisions == []


UNSEEN = {
    *(Kind.OTHER_APP, Kind.OTHER_KMS, Kind.APP_CA_OF_OTHER_APP, Kind.WRONG_CA_USAGE),
    *(Kind.CA_WITHOUT_APP_ID, Kind.CA_WITHOUT_PATH_LENGTH, Kind.CLIENT_ONLY_EKU),
}
"""Nothing is wrong in the leaf itself: seen by nginx, or only by the embedded terminator."""


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in UNSEEN])
async def test_a_leaf_that_breaks_a_rule(rig: Rig, kind: Kind) -> None:
    leaf = escaped(impostor_chain(KMS, kind, APP_B, APP_A).leaf_pem)
    if kind is Kind.SUB_CA:  # its issuer is named as an app CA is
        assert rig.app_id(*shown(leaf)) == APP_B
        return
    assert "chain rule" in rig.refused("client_cert_untrusted", *shown(leaf))
    assert rig.decisions == []


async def test_a_leaf_that_the_root_has_signed(rig: Rig) -> None:
    direct = KMS.sign_leaf(ROOT_NAME, KMS.root_key, [], (KMS.root,))
    said = rig.refused("client_cert_untrusted", *shown(escaped(direct.leaf_pem)))
    assert "chain rule 1: the leaf's issuer" in said


# Policy.


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
async def test_policy(rigs: Callable[..., Rig], allow: str, app: Any, let: bool) -> None:
    rig = rigs(allow)
    fields = shown(escaped(KMS.issue(app).leaf_pem))
    for _ in range(2):
        if let:
            assert rig.app_id(*fields) == app
        else:
            detail = rig.refused("policy_denied", *fields)
            assert app in detail
            assert "MESH_ALLOWED_APPS" in detail
    assert rig.decisions == ["allow" if let else "deny"] * 2


async def test_without_an_identity_of_our_own_self_is_nobody(rigs: Callable[..., Rig]) -> None:
    own = shown(escaped(KMS.issue(APP_A).leaf_pem))
    rigs("self", own=False).refused("policy_denied", *own)
    assert rigs("any", own=False).app_id(*own) == APP_A
    assert rigs(APP_A, own=False).app_id(*own) == APP_A


async def test_who_we_are_is_asked_each_time(rigs: Callable[..., Rig]) -> None:
    rig = rigs("self")
    rig.refused("policy_denied", *shown())
    rig.identity.current = snapshot_of(KMS, APP_B)
    assert rig.app_id(*shown()) == APP_B


# Other requests.


@pytest.mark.parametrize("fields", [(), shown(), ("x-client-verify: FAILED",)])
async def test_health_is_open(rig: Rig, fields: tuple[str, ...]) -> None:
    reply = rig.ask(*fields, line="GET /health HTTP/1.1")
    assert (reply.status, reply.body) == (200, "OK\n")
    assert rig.ask(*fields, line="HEAD /health?x HTTP/1.0").status == 200
    assert rig.decisions == []


@pytest.mark.parametrize(
    "line",
    [
        *("GET / HTTP/1.1", "GET /auth/ HTTP/1.1", "GET /Auth HTTP/1.1", "GET //auth HTTP/1.1"),
        *("GET /x/../auth HTTP/1.1", "POST /auth HTTP/1.1", "DELETE /health HTTP/1.1"),
        *("OPTIONS * HTTP/1.1", "GET /%61uth HTTP/1.1", "get /auth HTTP/1.1"),
    ],
)
async def test_anything_else_is_a_denial(rig: Rig, line: str) -> None:
    assert "GET /auth and GET /health" in rig.refused("policy_denied", *shown(), line=line)
    assert rig.decisions == []


@pytest.mark.parametrize(
    "block",
    [
        b"Host: x\r\nx-client-verify : SUCCESS\r\n",
        b"Host: x\r\nx-client-cert: a\r\n\tb\r\n",  # as `$ssl_client_cert` once wrote it
        b"Host: x\r\nx-client-cert: a\x00\r\n",
        b"x-client-verify: SUCCESS\r\n",
        b"Host: x\r\nHost: y\r\n",
        b"Host: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n",
        b"Host: x\r\n" + b"a: b\r\n" * 200,
    ],
)
async def test_a_question_that_cannot_be_read_is_a_denial(rig: Rig, block: bytes) -> None:
    reply = Reply(rig.raw(b"GET /auth HTTP/1.1\r\n%b\r\n" % block))
    assert (reply.status, reply.fields["x-dstack-mesh-error"]) == (401, "client_cert_untrusted")
    assert reply.fields["connection"] == "close"


async def test_a_body_that_nginx_announces_and_does_not_send_costs_the_connection(
    rig: Rig,
) -> None:
    reply = rig.ask("Content-Length: 5", *shown())
    assert (reply.status, reply.fields["connection"]) == (200, "close")


async def test_the_absolute_form_is_understood(rig: Rig) -> None:
    assert rig.app_id(*shown(), line="GET http://mesh/auth HTTP/1.1") == APP_B


async def test_errors_name_the_request(rig: Rig) -> None:
    reply = rig.ask("x-request-id: abc", "x-client-verify: NONE")
    assert json.loads(reply.body)["request_id"] == "abc"
    long = rig.ask("x-request-id: " + "é" * 4000)
    assert len(json.loads(long.fields["x-dstack-mesh-problem"])["request_id"]) == 100


async def test_what_the_request_was_is_kept_for_rules(rig: Rig) -> None:
    line = parse_request_line(b"GET /auth HTTP/1.1")
    block = b"Host: x\r\nx-original-method: PUT\r\nx-original-uri: /a?b\r\n"
    plan = rig.service.plan(line, block)
    assert (plan.method, plan.target) == (b"PUT", b"/a?b")
    plan = rig.service.plan(line, b"Host: x\r\n")
    assert (plan.method, plan.target) == (b"", b"")
    assert rig.service.may_persist()


async def test_all_small_combinations_fail_closed(rig: Rig) -> None:
    """Of all ways to put the two fields together, only the one that is right lets through."""
    verdicts = ["SUCCESS", "success", "NONE", "FAILED:x", "", None]
    certificates = [GOOD, GOOD + "%0A", GOOD[:-1], "x", "", None]
    for verdict, certificate in itertools.product(verdicts, certificates):
        fields = [f"x-client-verify: {verdict}"] * (verdict is not None)
        fields += [f"x-client-cert: {certificate}"] * (certificate is not None)
        status = rig.ask(*fields).status
        right = verdict == "SUCCESS" and certificate in (GOOD, GOOD + "%0A")
        assert status == (200 if right else 401), (verdict, certificate)


# The memory of leaves.


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Give the certificates that were really read."""
    found: list[bytes] = []
    real = parse_escaped_pem

    def parse(value: bytes) -> bytes:
        found.append(value)
        return real(value)

    monkeypatch.setattr(auth_service, "parse_escaped_pem", parse)
    return found


def test_a_leaf_is_read_once_and_believed_until_it_expires(seen: list[bytes]) -> None:
    now = int(time.time())
    leaf = escaped(KMS.issue(APP_B, not_before=now - 10, not_after=now + 10).leaf_pem).encode()
    clock = Clock(now)
    leaves = KnownLeaves(clock=clock)
    for clock.now in (now, now + 9.9, now + 5):
        assert leaves.identify(leaf).app_id == APP_B
    assert len(seen) == 1
    clock.now = now + 10
    for _ in range(2):
        with pytest.raises(ChainRuleBroken, match="valid from"):
            leaves.identify(leaf)
    assert len(seen) == 3


def test_what_was_refused_is_not_remembered(seen: list[bytes]) -> None:
    now = int(time.time())
    leaf = escaped(KMS.issue(APP_B, not_before=now + 10, not_after=now + 20).leaf_pem).encode()
    clock = Clock(now)
    leaves = KnownLeaves(clock=clock)
    with pytest.raises(ChainRuleBroken):
        leaves.identify(leaf)
    with pytest.raises(EscapedPemError):
        leaves.identify(b"x")
    clock.now = now + 10
    assert leaves.identify(leaf).app_id == APP_B
    assert len(seen) == 3


def test_the_memory_is_bounded_and_keeps_what_was_used_last(seen: list[bytes]) -> None:
    leaves = KnownLeaves(capacity=2)
    one, two, three = (escaped(KMS.issue(APP_B).leaf_pem).encode() for _ in range(3))
    for leaf in (one, two, one, three, one):
        leaves.identify(leaf)
    assert len(seen) == 3
    leaves.identify(two)
    assert len(seen) == 4


# Rules.

ASKS = (
    Rule("read", "allow", methods=("GET",), paths=("/api/**",)),
    Rule("own device", "allow", device_id=("d" * 64,)),
)


def asked(method: str | None, uri: str | None) -> tuple[str, ...]:
    said = (("x-original-method", method), ("x-original-uri", uri))
    return (*shown(), *(f"{name}: {value}" for name, value in said if value is not None))


async def test_rules_are_about_the_request_that_nginx_asks_about(rig: Rig) -> None:
    rig.policy.replace(Policy(Allow(anyone=True), ASKS), NO_ROUTES)
    assert rig.app_id(*asked("GET", "/api/x?y")) == APP_B
    assert rig.app_id(*asked("GET", "/api/x?y"), line="HEAD /auth HTTP/1.1") == APP_B
    for method, uri in (
        *(("PUT", "/api/x"), ("GET", "/other"), ("get", "/api/x"), ("", "/api/x"), ("GET", "")),
        *((None, "/api/x"), ("GET", None), (None, None), ("GET", "http://x/api/x")),
        *(("GET", "/other/../api/x"), ("GET", "//api/x"), ("GET", "/api/x#y"), ("GET", "/api/ x")),
    ):
        detail = rig.refused("policy_denied", *asked(method, uri))
        assert detail
    assert "'/..' is in it" in rig.refused("policy_denied", *asked("GET", "/b/../api/x"))
    assert rig.decisions == ["allow"] * 2 + ["deny"] * 14


async def test_two_answers_to_what_was_asked_are_none(rig: Rig) -> None:
    rig.policy.replace(Policy(Allow(anyone=True), ASKS), NO_ROUTES)
    twice = (*asked("GET", "/api/x"), "x-original-uri: /other")
    rig.refused("client_cert_untrusted", *twice)
    alike = ("x_original_method: GET", "x_original_uri: /api/x")
    rig.refused("policy_denied", *shown(), *alike)


async def test_what_the_leaf_says_of_its_device_counts(rig: Rig) -> None:
    rig.policy.replace(Policy(Allow(anyone=True), ASKS), NO_ROUTES)
    info = AppInfo(APP_B, "c" * 64, "1" * 40, "d" * 64, "e" * 64)
    right = escaped(KMS.issue(APP_B, app_info=info).leaf_pem)
    wrong = escaped(KMS.issue(APP_B, app_info=replace(info, device_id="a" * 64)).leaf_pem)
    put = ("x-original-method: PUT", "x-original-uri: /b")
    assert rig.app_id(*shown(right), *put) == APP_B
    rig.refused("policy_denied", *shown(wrong), *put)
    rig.refused("policy_denied", *shown(), *put)


async def test_audit_lets_through_and_logs(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.policy.replace(Policy(Allow(), ASKS, audit=True), NO_ROUTES)
    assert rig.app_id(*asked("PUT", "/b"), "x-request-id: r-1") == APP_B
    rig.refused("client_cert_untrusted", "x-client-verify: FAILED")
    assert rig.decisions == ["audit"]
    (record,) = [one for one in caplog.records if one.getMessage() == "policy_audited"]
    assert vars(record)["fields"]["path"] == "/b"
    assert vars(record)["fields"]["request_id"] == "r-1"


async def test_self_is_nobody_while_we_are_nobody(rigs: Callable[..., Rig]) -> None:
    rig = rigs(own=False)
    own, others = Rule("own", "deny", apps=Allow(own=True)), Rule("others", "allow")
    rig.policy.replace(Policy(Allow(anyone=True), (own, others)), NO_ROUTES)
    assert '"own"' in rig.refused("policy_denied", *shown())
    rig.identity.current = OURS
    assert rig.app_id(*shown()) == APP_B

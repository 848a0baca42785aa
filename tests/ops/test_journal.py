from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from tests.identities import FakeIdentity

from dstack_mesh.errors import BadRequest
from dstack_mesh.inbound.auth_service import AuthService
from dstack_mesh.model import AppId, PeerIdentity
from dstack_mesh.ops.journal import DENIALS, Access, Journal
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.decide import Policy
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.tally import PeerTally
from dstack_mesh.sim.kms import Kms
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import parse_request_line

APP, OTHER = "aa" * 20, "bb" * 20
TARGET = b"x-dstack-target-app"
SECRETS = (
    b"Host: h\r\nAuthorization: Bearer s3cret\r\nCookie: s3cret\r\nx-api-key: s3cret\r\n"
    b"x-dstack-target-app: " + OTHER.upper().encode() + b"\r\n"
)


class FakeLane:
    def __init__(self, peer: PeerTally | None) -> None:
        self.peer = peer


class FakeExchange:
    """An exchange that has ended; what the journal reads of it."""

    def __init__(self, **changes: Any) -> None:
        self.line = parse_request_line(b"POST /orders/7?token=s3cret HTTP/1.1")
        self.fields = parse_request_fields(SECRETS, 1, frozenset((TARGET,)))
        self.handler: object = None
        self.peer: PeerIdentity | None = None
        self.lane: FakeLane | None = None
        self.status, self.code, self.detail, self.request_id = 200, "", "", ""
        self.bytes_up, self.bytes_down = 3, 5
        self.started, self.finished = 100.0, 100.5
        self.reached = self.first_byte = 0.0
        self.reused: bool | None = None
        for name, value in changes.items():
            setattr(self, name, value)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO, "dstack_mesh")
    yield caplog
    assert "s3cret" not in str([record.__dict__ for record in caplog.records])


def events(logged: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    return [r.__dict__["fields"] for r in logged.records if r.getMessage() == name]


class FakeCaller:
    """The handler of a caller's connection."""

    def __init__(self, app_id: str) -> None:
        self.app_id = app_id
        self.tally = PeerTally(app_id)
        self.rule = ""


def record(access: Access, exchange: FakeExchange, direction: str = "outbound") -> Journal:
    """Have the exchange recorded the way that a `Service` does it."""
    journal = Journal(access, clock=lambda: 1000.0)
    if exchange.code or exchange.status >= 500 or not exchange.status:
        journal.failed(direction, exchange)  # type: ignore[arg-type]
    if journal.recorder is not None:
        journal.recorder(direction, exchange)  # type: ignore[arg-type]
    return journal


# The access log.


def test_all_that_is_told_of_an_exchange(logged: pytest.LogCaptureFixture) -> None:
    peer = PeerIdentity(AppId(OTHER), NEVER)
    lane = FakeLane(None)
    record(
        "all", FakeExchange(peer=peer, lane=lane, reached=100.25, reused=False, first_byte=100.375)
    )
    (found,) = events(logged, "access")
    request_id = found.pop("request_id")
    assert len(request_id) == 32, "made, where there was none"
    assert found == {
        "direction": "outbound",
        "method": "POST",
        "path": "/orders/7",
        "status": 200,
        "code": "",
        "peer": OTHER,
        "rule": None,
        "seconds": 0.5,
        "connect_seconds": 0.25,
        "first_byte_seconds": 0.375,
        "bytes_up": 3,
        "bytes_down": 5,
        "reused": False,
    }


def test_a_reused_connection_and_a_short_answer(logged: pytest.LogCaptureFixture) -> None:
    record("all", FakeExchange(lane=FakeLane(None), reused=True))
    (found,) = events(logged, "access")
    assert (found["reused"], found["connect_seconds"]) == (True, None)
    assert found["first_byte_seconds"] == 0.5, "it came in one piece"


def test_what_never_was_is_told_as_such(logged: pytest.LogCaptureFixture) -> None:
    record("all", FakeExchange(status=0))
    record("all", FakeExchange(lane=FakeLane(None), status=502, code="x"))
    own, failed = events(logged, "access")
    assert (own["reused"], own["connect_seconds"], own["first_byte_seconds"]) == (None, None, None)
    assert (failed["reused"], failed["connect_seconds"]) == (None, None)


@pytest.mark.parametrize(
    ("access", "written"),
    [("off", []), ("errors", [500, 0, 403]), ("all", [200, 404, 500, 0, 403])],
)
def test_which_exchanges_are_written(
    access: Access, written: list[int], logged: pytest.LogCaptureFixture
) -> None:
    for status, code in ((200, ""), (404, ""), (500, ""), (0, ""), (403, "policy_denied")):
        record(access, FakeExchange(status=status, code=code))
    assert [found["status"] for found in events(logged, "access")] == written


def test_while_it_is_off_nobody_is_to_be_told_of_each_exchange() -> None:
    assert Journal("off").recorder is None
    assert Journal("errors").recorder is None


def test_a_request_has_one_id_in_answer_and_log(logged: pytest.LogCaptureFixture) -> None:
    fields = parse_request_fields(b"Host: h\r\nx-request-id: r-7\r\n", 1, frozenset())
    record("all", FakeExchange(fields=fields))
    record("all", FakeExchange(request_id="made-for-it", code="bad_target", status=400))
    assert [found["request_id"] for found in events(logged, "access")] == ["r-7", "made-for-it"]


def test_the_level_of_other_events_does_not_silence_it(logged: pytest.LogCaptureFixture) -> None:
    logging.getLogger("dstack_mesh").setLevel(logging.ERROR)
    record("all", FakeExchange())
    assert len(events(logged, "access")) == 1


def test_a_head_that_was_no_request(logged: pytest.LogCaptureFixture) -> None:
    for access, lines in (("off", 0), ("errors", 1), ("all", 1)):
        logged.clear()
        journal = Journal(access)  # type: ignore[arg-type]
        journal.refused("inbound", BadRequest("it is TLS"), "r-1")
        assert len(events(logged, "access")) == lines
        (incident,) = journal.incidents()
        assert (incident.code, incident.status, incident.detail) == (
            "bad_request",
            400,
            "it is TLS",
        )
        assert (incident.direction, incident.request_id) == ("inbound", "r-1")


# Incidents, and whose doing they were.


def test_an_error_is_kept_with_its_reason(logged: pytest.LogCaptureFixture) -> None:
    tally = PeerTally(f"{OTHER}:443")
    exchange = FakeExchange(
        status=502, code="tls_failed", detail="why", request_id="r-1", lane=FakeLane(tally)
    )
    (incident,) = record("off", exchange).incidents()
    assert (incident.at, incident.direction) == (1000.0, "outbound")
    assert (incident.code, incident.status, incident.detail) == ("tls_failed", 502, "why")
    assert (incident.method, incident.path) == ("POST", "/orders/7")
    assert (incident.peer, incident.request_id) == (OTHER, "r-1")
    assert (tally.errors, tally.last_error) == (1, (1000.0, "tls_failed", "why"))
    assert events(logged, "request_denied") == []


def test_an_applications_own_error_is_no_incident() -> None:
    assert record("off", FakeExchange(status=500)).incidents() == []


def test_a_caller_is_named_and_counted(logged: pytest.LogCaptureFixture) -> None:
    handler = FakeCaller(APP)
    handler.rule = "no writes"
    exchange = FakeExchange(handler=handler, status=403, code="policy_denied", detail="rule x")
    (incident,) = record("off", exchange, "inbound").incidents()
    assert (incident.peer, incident.rule) == (APP, "no writes")
    assert handler.tally.errors == 1
    assert events(logged, "request_denied") == [], "policy has its own event"


def test_a_denial_is_told_with_whom_and_why(logged: pytest.LogCaptureFixture) -> None:
    code = "client_cert_untrusted"
    exchange = FakeExchange(handler=FakeCaller(APP), status=401, code=code, detail="rule 2")
    (incident,) = record("off", exchange, "inbound").incidents()
    assert incident.rule == "", "of this connection's last decision, and not of this answer"
    (denied,) = events(logged, "request_denied")
    assert (denied["peer"], denied["code"], denied["reason"]) == (APP, code, "rule 2")
    assert (denied["method"], denied["path"]) == ("POST", "/orders/7")
    assert denied["request_id"]


def test_a_call_of_the_agent_that_is_not_offered_is_the_agents() -> None:
    (incident,) = record("off", FakeExchange(status=403, code="agent_denied")).incidents()
    assert incident.direction == "agent"


def test_in_nginx_mode_the_question_is_what_counts(logged: pytest.LogCaptureFixture) -> None:
    kms = Kms(b"journal")
    service = AuthService(FakeIdentity(None), Current(Policy(Allow.parse("self"))))
    leaf = quote(kms.issue(AppId(APP)).leaf_pem, safe="").encode()
    block = (
        b"Host: mesh\r\nx-client-verify: SUCCESS\r\nx-client-cert: %b\r\n"
        b"x-original-method: DELETE\r\nx-original-uri: /things?x=s3cret\r\n" % leaf
    )
    plan = service.plan(parse_request_line(b"GET /auth HTTP/1.1"), block)
    exchange = FakeExchange(handler=service, fields=plan.fields, status=403, code="policy_denied")
    (incident,) = record("off", exchange, "inbound").incidents()
    assert (incident.peer, incident.method, incident.path) == (APP, "DELETE", "/things")


@pytest.mark.parametrize("code", sorted(DENIALS))
def test_every_denial_is_logged_though_the_access_log_is_off(
    code: str, logged: pytest.LogCaptureFixture
) -> None:
    record("off", FakeExchange(status=403, code=code))
    assert [found["code"] for found in events(logged, "request_denied")] == [code]


def test_a_flood_of_denials_is_counted(logged: pytest.LogCaptureFixture) -> None:
    journal = Journal("off")
    exchange = FakeExchange(handler=FakeCaller(APP), status=403, code="client_cert_untrusted")
    for _ in range(500):
        journal.failed("inbound", exchange)  # type: ignore[arg-type]
    other = FakeExchange(handler=FakeCaller(OTHER), status=403, code="client_cert_untrusted")
    journal.failed("inbound", other)  # type: ignore[arg-type]
    peers = [found["peer"] for found in events(logged, "request_denied")]
    assert peers == [APP] * 10 + [OTHER]
    journal._denials.flush()
    (left_out,) = events(logged, "events_left_out")
    assert (left_out["count"], left_out["most_by"]) == (490, {APP: 490})
    assert len(journal.incidents()) == 100


def test_a_scanner_cannot_push_out_what_an_app_was_refused(
    logged: pytest.LogCaptureFixture,
) -> None:
    journal = record("off", FakeExchange(status=403, code="policy_denied"), "inbound")
    for _ in range(1000):
        journal.handshake_failed("the peer does not speak TLS")
    codes = [incident.code for incident in journal.incidents()]
    assert codes.count("handshake_failed") == 30
    assert "policy_denied" in codes
    assert len(events(logged, "inbound_handshake_failed")) == 10


def test_a_long_path_is_cut() -> None:
    line = parse_request_line(b"GET /" + b"a" * 5000 + b" HTTP/1.1")
    (incident,) = record("off", FakeExchange(line=line, status=502, code="x")).incidents()
    assert len(incident.path) == 256

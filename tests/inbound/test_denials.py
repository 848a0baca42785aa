"""What is logged of a denial, and how often."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tests.policy.cases import FRIEND, STRANGER, caller

from dstack_mesh.inbound.denials import DenialLog
from dstack_mesh.policy.decide import Decision

DENIED = Decision(False, False, "a rule", "the reason")
BY_NONE = Decision(False, False, None, "no rule")
AUDITED = Decision(True, True, "a rule", "the reason")


class Logged:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "dstack_mesh")
        self._caplog = caplog
        self.now = 1000.0
        self.log = DenialLog(lambda: self.now)

    def add(self, decision: Decision = DENIED, app: Any = STRANGER, **more: Any) -> None:
        self.log.add(decision, caller(app), b"GET", b"/a?secret=1", **more)

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        found = [(one.getMessage(), vars(one)["fields"]) for one in self._caplog.records]
        assert all(one.levelno == logging.WARNING for one in self._caplog.records)
        self._caplog.clear()
        return found


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    return Logged(caplog)


def test_one_event_says_who_what_and_which_rule(logged: Logged) -> None:
    logged.add(request_id=b"r-1")
    (name, fields), *rest = logged.take()
    assert not rest
    assert name == "policy_denied"
    assert fields == {
        "caller": STRANGER,
        "rule": "a rule",
        "method": "GET",
        "path": "/a",
        "why": "the reason",
        "request_id": "r-1",
    }


def test_no_rule_and_an_instance(logged: Logged) -> None:
    who = caller(FRIEND, {"instance_id": "3" * 40})
    logged.log.add(BY_NONE, who, b"", b"/" + b"a" * 5000 + b"\xff")
    ((_, fields),) = logged.take()
    assert (fields["rule"], fields["instance"], fields["method"]) == (None, "3" * 40, "")
    assert len(fields["path"]) == 200


def test_what_is_audited_has_a_name_of_its_own(logged: Logged) -> None:
    logged.add(AUDITED)
    assert [name for name, _ in logged.take()] == ["policy_audited"]


def test_a_flood_is_counted_and_not_logged(logged: Logged) -> None:
    for _ in range(1000):
        logged.add()
    assert len(logged.take()) == 10
    logged.now += 9.9
    logged.add()
    assert logged.take() == []
    logged.now += 0.2
    logged.add(BY_NONE)
    (name, left_out), (_, next_one) = logged.take()
    assert (name, left_out["of"], left_out["count"]) == ("events_left_out", "policy_denied", 991)
    assert left_out["most_by"] == {f"{STRANGER} by a rule": 991}
    assert next_one["rule"] is None


def test_one_callers_flood_does_not_hide_another(logged: Logged) -> None:
    for _ in range(1000):
        logged.add()
    logged.take()
    logged.add(app=FRIEND)
    logged.add(BY_NONE)
    logged.add(AUDITED)
    assert len(logged.take()) == 3

from __future__ import annotations

import logging

import pytest

from dstack_mesh.log_limit import LogLimit
from tests.integration.harness import eventually

logger = logging.getLogger("tests.log_limit")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.INFO, "tests.log_limit")
    return Clock()


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, object]]]:
    found = [(record.getMessage(), record.__dict__["fields"]) for record in caplog.records]
    caplog.clear()
    return found


def test_up_to_the_limit_each_is_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limit = LogLimit(logger, "denied", burst=3, clock=clock)
    for number in range(3):
        limit.event(logging.WARNING, "a", number=number)
    assert told(caplog) == [("denied", {"number": number}) for number in range(3)]
    clock.now += 1000
    limit.event(logging.WARNING, "a", number=3)
    assert told(caplog) == [("denied", {"number": 3})], "nothing was left out, and none is told"


def test_what_is_over_it_is_counted_and_told_with_the_next(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    limit = LogLimit(logger, "denied", burst=2, window=10, clock=clock)
    for _ in range(7):
        limit.event(logging.WARNING, "a")
    assert len(told(caplog)) == 2
    clock.now += 10
    limit.event(logging.WARNING, "a")
    left_out = {"of": "denied", "count": 5, "seconds": 10, "most_by": {"a": 5}}
    assert told(caplog) == [("events_left_out", left_out), ("denied", {})]


def test_one_who_is_loud_does_not_silence_another(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    limit = LogLimit(logger, "denied", burst=2, clock=clock)
    for _ in range(1000):
        limit.event(logging.WARNING, "loud", who="loud")
    limit.event(logging.WARNING, "quiet", who="quiet")
    assert [fields["who"] for _, fields in told(caplog)] == ["loud", "loud", "quiet"]


def test_a_thousand_keys_are_bounded(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limit = LogLimit(logger, "denied", burst=1, clock=clock)
    for number in range(1000):
        limit.event(logging.WARNING, str(number))
    assert len(told(caplog)) == 256 + 1, "those that share a count are told of too"
    limit.flush()
    ((name, fields),) = told(caplog)
    assert (name, fields["count"]) == ("events_left_out", 1000 - 257)
    assert fields["most_by"] == {"others": 743}
    limit.flush()
    assert told(caplog) == []


async def test_the_count_is_told_though_nothing_comes_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tests.log_limit")
    limit = LogLimit(logger, "denied", burst=1, window=0.05)
    for _ in range(4):
        limit.event(logging.WARNING, "a")
    await eventually(lambda: len(caplog.records) == 2)
    assert told(caplog)[1][1]["count"] == 3


def test_below_the_loggers_level_nothing_is_counted(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    limit = LogLimit(logger, "denied", burst=1, clock=clock)
    for _ in range(5):
        limit.event(logging.DEBUG, "a")
    limit.flush()
    assert told(caplog) == []

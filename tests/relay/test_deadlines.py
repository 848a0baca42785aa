from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from dstack_mesh.relay.deadlines import NEVER, Deadlines, Timeouts


class FakeHandle:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when, self.callback, self.cancelled = when, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.handles: list[FakeHandle] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeHandle:
        self.handles.append(FakeHandle(self.now + delay, callback))
        return self.handles[-1]

    @property
    def pending(self) -> list[FakeHandle]:
        return [one for one in self.handles if not one.cancelled]

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [one for one in self.pending if one.when <= end]:
            first = min(due, key=lambda one: one.when)
            self.handles.remove(first)
            self.now = first.when
            first.callback()
        self.now = end


class Watched:
    def __init__(self, deadline: float, then: Callable[[], None] = lambda: None) -> None:
        self.deadline = deadline
        self.expired: list[float] = []
        self._then = then

    def expire(self, now: float) -> None:
        self.deadline = NEVER
        self.expired.append(now)
        self._then()


TICK = 0.5


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
def deadlines(loop: FakeLoop) -> Deadlines:
    return Deadlines(loop, TICK, loop.time)  # type: ignore[arg-type]


def test_what_is_due_expires_once_and_soon(loop: FakeLoop, deadlines: Deadlines) -> None:
    one, other = Watched(102.2), Watched(NEVER)
    deadlines.watch(one)
    deadlines.watch(other)
    loop.advance(2.1)
    assert one.expired == []
    loop.advance(0.1 + TICK)
    assert len(one.expired) == 1
    assert 102.2 <= one.expired[0] <= 102.2 + TICK
    loop.advance(60)
    assert (len(one.expired), other.expired) == (1, [])


def test_one_timer_serves_all(loop: FakeLoop, deadlines: Deadlines) -> None:
    for _ in range(50):
        deadlines.watch(Watched(NEVER))
        assert len(loop.pending) == 1


def test_a_deadline_that_moves_on_is_not_missed_and_not_early(
    loop: FakeLoop, deadlines: Deadlines
) -> None:
    one = Watched(101.0)
    deadlines.watch(one)
    loop.advance(0.9)
    one.deadline = 105.0
    loop.advance(3)
    assert one.expired == []
    loop.advance(2)
    assert len(one.expired) == 1


def test_the_sweep_stops_with_nothing_to_watch_and_starts_again(
    loop: FakeLoop, deadlines: Deadlines
) -> None:
    assert loop.pending == [], "nothing is watched yet"
    one = Watched(NEVER)
    deadlines.watch(one)
    deadlines.unwatch(one)
    deadlines.unwatch(one)
    loop.advance(TICK)
    assert loop.pending == []
    again = Watched(loop.now + 1)
    deadlines.watch(again)
    loop.advance(1 + TICK)
    assert len(again.expired) == 1


def test_what_is_no_longer_watched_does_not_expire(loop: FakeLoop, deadlines: Deadlines) -> None:
    one, other = Watched(101.0), Watched(NEVER)
    deadlines.watch(one)
    deadlines.watch(other)
    deadlines.unwatch(one)
    loop.advance(5)
    assert one.expired == []


def test_an_expiry_may_watch_and_unwatch(loop: FakeLoop, deadlines: Deadlines) -> None:
    new = Watched(103.0)

    def change() -> None:
        deadlines.unwatch(one)
        deadlines.watch(new)

    one = Watched(101.0, change)
    deadlines.watch(one)
    loop.advance(10)
    assert (len(one.expired), len(new.expired)) == (1, 1)
    assert len(loop.pending) == 1


def test_an_expiry_can_put_another_off(loop: FakeLoop, deadlines: Deadlines) -> None:
    def put_off(other: Callable[[], Watched]) -> Callable[[], None]:
        def then() -> None:
            other().deadline = NEVER

        return then

    # Whichever the sweep comes to first, the other one is not due any more.
    a = Watched(101.0, put_off(lambda: b))
    b = Watched(101.0, put_off(lambda: a))
    deadlines.watch(a)
    deadlines.watch(b)
    loop.advance(5)
    assert len(a.expired) + len(b.expired) == 1


def test_ones_mistake_does_not_end_the_others(
    loop: FakeLoop, deadlines: Deadlines, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("mine")

    faulty = [Watched(101.0, fail) for _ in range(3)]
    good = [Watched(101.0), Watched(103.0)]
    for one in (*faulty, *good):
        deadlines.watch(one)
    with caplog.at_level(logging.ERROR):
        loop.advance(5)
    assert [len(one.expired) for one in good] == [1, 1]
    assert [record.getMessage() for record in caplog.records] == ["expire_fault"] * 3


def test_after_close_nothing_expires(loop: FakeLoop, deadlines: Deadlines) -> None:
    one = Watched(101.0)
    deadlines.watch(one)
    deadlines.close()
    deadlines.close()
    assert loop.pending == []
    loop.advance(5)
    assert one.expired == []


@pytest.mark.parametrize(
    ("timeouts", "tick"),
    [
        (Timeouts(), 0.625),  # an eighth of the shortest, the 5 s of `linger`
        (Timeouts(head=0.4), 0.05),
        (Timeouts(idle=0.4), 0.05),
        (Timeouts(response=0.4), 0.05),
        (Timeouts(linger=0.001), 0.02),
        (Timeouts(head=100, linger=100), 1.0),
        (Timeouts(NEVER, NEVER, NEVER, NEVER), 1.0),
    ],
)
def test_the_sweep_is_fine_enough_for_the_shortest(timeouts: Timeouts, tick: float) -> None:
    assert timeouts.tick() == pytest.approx(tick)

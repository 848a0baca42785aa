from __future__ import annotations

from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.giving_way import BATCH, LongestWaiting


class Connection:
    def __init__(self, since: float) -> None:
        self.since = since
        self.asked = 0

    def waiting_since(self) -> float:
        self.asked += 1
        return self.since


def test_the_longest_waiting_comes_first() -> None:
    longest = LongestWaiting()
    open_ = [Connection(since) for since in (3.0, 1.0, NEVER, 2.0)]
    found = []
    while one := longest.find(open_, 100.0, 15.0):
        found.append(one.since)
        open_.remove(one)
    assert found == [1.0, 2.0, 3.0]


def test_who_has_not_waited_for_long_stays() -> None:
    longest = LongestWaiting()
    assert longest.find([Connection(85.1), Connection(NEVER)], 100.0, 15.0) is None
    assert longest.find([one := Connection(86.0)], 101.0, 15.0) is one


def test_who_has_asked_since_it_was_looked_at_stays() -> None:
    longest = LongestWaiting()
    open_ = [Connection(1.0), Connection(2.0), Connection(3.0)]
    assert longest.find(open_, 100.0, 15.0) is open_[0]
    open_[1].since = NEVER
    assert longest.find(open_, 100.0, 15.0) is open_[2]


def test_one_that_is_gone_is_not_found() -> None:
    longest = LongestWaiting()
    open_ = [Connection(1.0), Connection(2.0), Connection(3.0)]
    assert longest.find(open_, 100.0, 15.0) is open_.pop(0)
    open_.pop(0)
    assert longest.find(open_, 100.0, 15.0) is open_[0]


def test_a_flood_does_not_look_at_all_connections_each_time() -> None:
    longest = LongestWaiting()
    open_ = [Connection(float(number)) for number in range(200)]
    for _ in range(BATCH):
        one = longest.find(open_, 1000.0, 15.0)
        assert one is not None
        open_.remove(one)
    assert open_[-1].asked == 1
    busy = [Connection(NEVER)]
    for _ in range(100):
        assert longest.find(busy, 1000.5, 15.0) is None
    assert busy[0].asked == 1
    assert longest.find(busy, 1000.7, 15.0) is None
    assert busy[0].asked == 2

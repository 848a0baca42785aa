from __future__ import annotations

import os

from dstack_mesh.workers.shares import Shares


class Worker:
    """A worker's connections at one listener."""

    def __init__(self, shares: Shares, index: int, listener: str = "outbound") -> None:
        self.count = 0
        self.share = shares.of(index, listener, lambda: self.count)

    def leaves_it(self, count: int) -> bool:
        self.count = count
        return self.share.is_others_turn()


def test_who_has_clearly_more_leaves_the_next_to_another() -> None:
    shares = Shares(2, ["outbound"])
    one, other = Worker(shares, 0), Worker(shares, 1)
    assert not other.leaves_it(0)
    assert not one.leaves_it(0)
    assert not one.leaves_it(1), "one more is nothing"
    assert one.leaves_it(2)
    assert not other.leaves_it(1)
    assert not one.leaves_it(2)
    assert other.leaves_it(80)
    assert not one.leaves_it(91), "nor is an eighth"
    assert one.leaves_it(92)


def test_whoever_has_least_counts() -> None:
    shares = Shares(3, ["outbound"])
    workers = [Worker(shares, index) for index in range(3)]
    counts = (9, 3, 8)
    for _ in range(2):
        left = [worker.leaves_it(count) for worker, count in zip(workers, counts, strict=True)]
    assert left == [True, False, True]


def test_who_is_not_there_is_not_waited_for() -> None:
    shares = Shares(2, ["outbound"])
    one, other = Worker(shares, 0), Worker(shares, 1)
    assert not one.leaves_it(1000), "it has not come yet"
    other.leaves_it(0)
    assert one.leaves_it(1000)
    other.share.leave()
    assert not one.leaves_it(1000), "it accepts no more"
    other.leaves_it(0)
    shares.clear(1)
    assert not one.leaves_it(1000), "it has died"


def test_each_listener_has_its_own() -> None:
    shares = Shares(2, ["outbound", "inbound", "admin"])
    one, other = Worker(shares, 0, "inbound"), Worker(shares, 1, "inbound")
    for name in ("outbound", "admin"):
        Worker(shares, 1, name).leaves_it(0)
    assert not one.leaves_it(1000)
    other.leaves_it(0)
    assert one.leaves_it(1000)
    shares.clear(1)
    assert not one.leaves_it(1000)


def test_no_listeners_at_all() -> None:
    Shares(2, []).clear(1)


def test_all_processes_see_them() -> None:
    shares = Shares(2, ["outbound"])
    one = Worker(shares, 0)
    assert not one.leaves_it(1000)
    pid = os.fork()
    if pid == 0:
        Worker(shares, 1).leaves_it(5)
        os._exit(0)
    os.waitpid(pid, 0)
    assert one.leaves_it(1000)
    assert not one.leaves_it(6)

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from tests.integration.harness import eventually

from dstack_mesh.relay import accept as module
from dstack_mesh.relay.accept import Acceptor, spare_descriptors

Events = list[tuple[str, str, Any]]
"""Level, name and fields."""


class FakeListening:
    """A listening socket of which the test says what accepting gives."""

    def __init__(self) -> None:
        self._own, self._other = socket.socketpair()
        self.gives: list[OSError | socket.socket] = []
        self.asked: list[float] = []

    def fileno(self) -> int:
        return self._own.fileno()

    def become_readable(self) -> None:
        self._other.send(b"x")

    def accept(self) -> tuple[socket.socket, object]:
        self.asked.append(asyncio.get_running_loop().time())
        if not self.gives:
            raise BlockingIOError
        one = self.gives.pop(0)
        if isinstance(one, OSError):
            raise one
        return one, None

    def close(self) -> None:
        self._own.close()
        self._other.close()


class Yields:
    def __init__(self, *, can: int = 0) -> None:
        self.can = can
        self.asked = 0

    def give_way(self) -> bool:
        self.asked += 1
        self.can -= 1
        return self.can >= 0


class Rig:
    def __init__(self, **said: Any) -> None:
        self.listening = FakeListening()
        self.taken: list[socket.socket] = []
        loop = asyncio.get_running_loop()
        sock: Any = self.listening
        self.acceptor = Acceptor(loop, sock, "inbound", self.taken.append, **said)
        self.others: list[socket.socket] = []

    def add_client(self) -> None:
        ours, theirs = socket.socketpair()
        self.others.append(theirs)
        self.listening.gives.append(ours)

    def close(self) -> None:
        self.acceptor.stop()
        left = [one for one in self.listening.gives if isinstance(one, socket.socket)]
        for sock in (*self.taken, *self.others, *left, self.listening):
            sock.close()


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.03)
    monkeypatch.setattr(module, "CALM", 0.1)


class Log(logging.Handler):
    """Keeps names and fields of events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: Events = []

    def emit(self, record: logging.LogRecord) -> None:
        fields: Any = record.fields  # type: ignore[attr-defined]  # see `dstack_mesh.log`
        self.events.append((record.levelname, record.getMessage(), fields))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Events:
    handler = Log()
    monkeypatch.setattr(module.log, "handlers", [handler])
    monkeypatch.setattr(module.log, "level", logging.INFO)
    module.log.manager._clear_cache()  # type: ignore[attr-defined]
    return handler.events


async def test_what_is_accepted_is_handed_over_not_blocking() -> None:
    rig = Rig()
    rig.add_client()
    rig.acceptor.start()
    rig.listening.become_readable()
    await eventually(lambda: rig.taken)
    assert rig.taken[0].gettimeout() == 0.0
    rig.close()


async def test_a_turn_accepts_a_bounded_number() -> None:
    rig = Rig(per_turn=3)
    for _ in range(7):
        rig.add_client()
    turns = []
    rig.acceptor.start()
    rig.listening.become_readable()
    while len(rig.taken) < 7:
        before = len(rig.taken)
        await asyncio.sleep(0)
        turns.append(len(rig.taken) - before)
    assert max(turns) == 3
    rig.close()


async def test_stopped_nothing_is_accepted() -> None:
    rig = Rig()
    rig.acceptor.stop()  # never started
    rig.acceptor.start()
    rig.acceptor.stop()
    rig.listening.become_readable()
    await asyncio.sleep(0.02)
    assert rig.listening.asked == []
    rig.close()


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN])
async def test_one_connection_that_failed_is_passed_over(number: int, log: Events) -> None:
    rig = Rig()
    rig.listening.gives = [OSError(number, "failed")] * 2
    rig.add_client()
    rig.acceptor.start()
    rig.listening.become_readable()
    await eventually(lambda: rig.taken)
    assert log == []
    rig.close()


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EMFILE, "Too many open files; raise the limit on open files (ulimit -n)"),
        (errno.ENFILE, "the whole system"),
        (errno.ENOBUFS, "no memory for sockets"),
        (errno.ENOMEM, "no memory for sockets"),
        (errno.EPERM, "Operation not permitted"),  # one that nobody thought of must not spin either
    ],
)
async def test_a_shortage_pauses_accepting_and_is_told_once(
    number: int, hint: str, log: Events
) -> None:
    rig = Rig()
    rig.listening.gives = [OSError(number, "failed")] * 4
    rig.add_client()
    rig.acceptor.start()
    rig.listening.become_readable()
    await eventually(lambda: rig.taken)
    asked = rig.listening.asked
    gaps = [b - a for a, b in itertools.pairwise(asked[:5])]
    assert all(gap >= 0.025 for gap in gaps), "a loop that does not pause eats a whole core"
    await eventually(lambda: len(log) == 2)
    begin, end = log
    assert begin[:2] == ("WARNING", "accept_paused")
    assert begin[2]["listener"] == "inbound"
    assert hint in begin[2]["reason"]
    assert end[:2] == ("INFO", "accept_resumed")
    assert end[2]["pauses"] == 4
    assert end[2]["seconds"] >= 0.1
    rig.close()


async def test_a_shortage_that_comes_and_goes_is_told_as_one(log: Events) -> None:
    rig = Rig()
    rig.acceptor.start()
    rig.listening.become_readable()
    for number in range(1, 6):
        rig.listening.gives.append(OSError(errno.EMFILE, "failed"))
        rig.add_client()
        await eventually(lambda number=number: len(rig.taken) == number)
    assert [name for _, name, _ in log] == ["accept_paused"]
    await eventually(lambda: len(log) == 2)
    assert log[1][2]["pauses"] == 5
    rig.close()


async def test_stop_in_a_pause_stays_stopped() -> None:
    rig = Rig()
    rig.listening.gives = [OSError(errno.EMFILE, "failed")]
    rig.add_client()
    rig.acceptor.start()
    rig.listening.become_readable()
    await eventually(lambda: rig.listening.asked)
    rig.acceptor.stop()
    await asyncio.sleep(0.08)
    assert rig.taken == []
    rig.close()


def lowest_free() -> int:
    probe = os.dup(0)
    os.close(probe)
    return probe


@pytest.fixture
def few_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let the test say how many descriptors this process may still open, without taking them."""

    def say(more: int) -> None:
        limit = (lowest_free() + more, 4096)
        monkeypatch.setattr(resource, "getrlimit", lambda which: limit)

    return say


async def test_the_last_descriptors_are_left_to_others(few_left: Any, log: Events) -> None:
    few_left(20)
    rig = Rig(spare=8)
    rig.acceptor.start()
    rig.listening.become_readable()
    while not log:
        rig.add_client()
        rig.listening.become_readable()
        await asyncio.sleep(0.005)
        assert len(rig.taken) < 30
    taken = len(rig.taken)
    assert lowest_free() < resource.getrlimit(resource.RLIMIT_NOFILE)[0], "there are some left"
    rig.add_client()
    await asyncio.sleep(0.1)
    assert len(rig.taken) == taken, "and they stay free, however long it lasts"
    for sock in rig.taken:
        sock.close()
    await eventually(lambda: len(rig.taken) > taken)
    await eventually(lambda: len(log) == 2)
    rig.close()


async def test_where_descriptors_are_short_others_give_way(few_left: Any) -> None:
    few_left(0)
    yields = Yields(can=2)
    rig = Rig(yielding=yields)
    rig.add_client()
    rig.acceptor.start()
    rig.listening.become_readable()
    await eventually(lambda: rig.taken)
    await eventually(lambda: yields.asked >= 4)
    assert yields.can < 0, "until there is none left that can"
    rig.close()


async def test_no_descriptor_at_all_is_a_shortage_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.listening.gives = [OSError(errno.EMFILE, "failed")]
    rig.add_client()
    fails = [True]
    dup = os.dup

    def failing(fd: int) -> int:
        if fails[0]:
            raise OSError(errno.EMFILE, "Too many open files")
        return dup(fd)

    monkeypatch.setattr(os, "dup", failing)
    rig.acceptor.start()
    rig.listening.become_readable()
    await asyncio.sleep(0.1)
    assert rig.taken == []
    fails[0] = False
    await eventually(lambda: rig.taken)
    rig.close()


@pytest.mark.parametrize(
    ("limit", "one"), [(96, 12), (1024, 128), (1 << 20, 256), (resource.RLIM_INFINITY, 256)]
)
def test_what_is_spared(monkeypatch: pytest.MonkeyPatch, limit: int, one: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert [spare_descriptors(shares) for shares in range(3)] == [0, one, 2 * one]


# Where several processes accept.


class FakeShare:
    def __init__(self) -> None:
        self.is_theirs = False
        self.asked = 0
        self.left = 0

    def is_others_turn(self) -> bool:
        self.asked += 1
        return self.is_theirs

    def leave(self) -> None:
        self.left += 1


async def test_others_know_of_us_from_the_start_to_the_end() -> None:
    share = FakeShare()
    rig = Rig(share=share)
    rig.acceptor.start()
    assert (share.asked, share.left) == (1, 0)
    rig.close()
    assert share.left == 1


async def test_each_connection_is_taken_only_where_it_is_ours() -> None:
    share = FakeShare()
    rig = Rig(share=share)
    rig.acceptor.start()
    for _ in range(3):
        rig.add_client()
    rig.listening.become_readable()
    await eventually(lambda: len(rig.taken) == 3)
    assert share.asked >= 4
    rig.close()


async def test_what_others_leave_is_taken_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OTHERS_TURN", 0.05)
    share = FakeShare()
    share.is_theirs = True
    rig = Rig(share=share)
    rig.acceptor.start()
    for _ in range(7):
        rig.add_client()
    rig.listening.become_readable()
    await eventually(lambda: share.asked > 1)
    asked = share.asked
    await asyncio.sleep(0.02)
    assert (rig.taken, rig.listening.asked) == ([], [])
    assert share.asked == asked, "the loop turned for nothing"
    await eventually(lambda: len(rig.taken) == 7)
    times = rig.listening.asked
    pauses = [later - one > 0.04 for one, later in itertools.pairwise(times)]
    assert pauses[:6] == [True, False, True, False, False, False], "one, two, four of them"

    await eventually(lambda: len(rig.listening.asked) == 8)  # nobody waits any more
    rig.listening.asked.clear()
    for _ in range(2):
        rig.add_client()
    await eventually(lambda: len(rig.taken) == 9)
    first, second, *_ = rig.listening.asked
    assert second - first > 0.04, "one at first again"
    rig.close()


async def test_nothing_is_taken_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OTHERS_TURN", 0.02)
    share = FakeShare()
    share.is_theirs = True
    rig = Rig(share=share)
    rig.acceptor.start()
    rig.add_client()
    rig.listening.become_readable()
    await eventually(lambda: share.asked > 1)
    rig.acceptor.stop()
    await asyncio.sleep(0.05)
    assert rig.taken == []
    rig.close()

"""Memory that all workers see: written whole or not at all, and outliving who wrote it."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable

import msgspec
import pytest
from tests.ops.reports import worker_report

from dstack_mesh.ops.families import Family, Sample
from dstack_mesh.ops.report import WorkerReport
from dstack_mesh.workers import ledger as module
from dstack_mesh.workers.ledger import Ledger, Slot


def slot(size: int) -> tuple[Slot, bytearray]:
    memory = bytearray(Slot.room(size))
    return Slot(memoryview(memory), size), memory


def in_another_process(act: Callable[[], object]) -> int:
    """Do it in a fork of this process; give how that has ended."""
    pid = os.fork()
    if pid == 0:
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("size", [1, 3, 8, 64, 1000])
def test_the_last_that_was_written_is_read(size: int) -> None:
    one, _ = slot(size)
    assert one.read() == b""
    for data in (b"a" * size, b"", b"b", b"c" * size):
        assert one.write(data)
        assert one.read() == data


def test_what_has_no_room_leaves_what_was_there() -> None:
    one, memory = slot(8)
    one.write(b"12345678")
    before = bytes(memory)
    assert not one.write(b"123456789")
    assert (one.read(), memory) == (b"12345678", before)


def test_slots_lie_side_by_side() -> None:
    memory = memoryview(bytearray(2 * Slot.room(5)))
    first, second = Slot(memory, 5), Slot(memory[Slot.room(5) :], 5)
    for _ in range(3):
        first.write(b"aaaaa")
        second.write(b"bbbbb")
        assert (first.read(), second.read()) == (b"aaaaa", b"bbbbb")


def test_a_writer_that_dies_at_any_byte_leaves_what_was_there() -> None:
    """All that it had written by then is somewhere else."""
    one, memory = slot(16)
    one.write(b"the one before")
    before = bytes(memory)
    one.write(b"the next one")
    after = bytes(memory)
    body = [at for at in range(8, len(memory)) if before[at] != after[at]]
    assert body
    for died_at in range(len(body)):
        memory[:] = before
        for at in body[:died_at]:
            memory[at] = after[at]
        assert one.read() == b"the one before"


def test_who_reads_while_another_writes_has_one_of_both() -> None:
    one, _ = slot(50_000)
    texts = [bytes([n]) * (n * 1000) for n in range(1, 51)]
    one.write(texts[0])
    stop = threading.Event()

    def write() -> None:
        chosen = random.Random(1)
        while not stop.is_set():
            one.write(chosen.choice(texts))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(one.read() in texts for _ in range(3000))
    finally:
        stop.set()
        writer.join()


def test_what_never_is_whole_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRIES", 3)
    one, memory = slot(8)
    one.write(b"12345678")
    memory[-9] ^= 1
    assert one.read() == b""


# How they are.


def test_one_line_for_all_where_they_are_alike() -> None:
    one = Ledger(2)
    one.seat(0, is_taken=True)
    one.seat(1, is_taken=True)
    assert one.status() == "starting (2 workers)"
    one.describe(0, "ready: app a")
    assert one.status() == "worker 0: ready: app a; worker 1: starting"
    one.describe(1, "ready: app a")
    assert one.status() == "ready: app a (2 workers)"


def test_who_has_gone_is_said_to_have_and_its_line_is_not_its_successors() -> None:
    one = Ledger(2)
    for index in range(2):
        one.seat(index, is_taken=True)
        one.describe(index, "ready")
    one.seat(1, is_taken=False)
    assert [one.is_seated(index) for index in range(2)] == [True, False]
    assert one.status() == "worker 0: ready; worker 1: being replaced"
    one.seat(1, is_taken=True)
    assert one.status() == "worker 0: ready; worker 1: starting"


def test_a_line_that_is_too_long_is_cut() -> None:
    one = Ledger(1)
    one.seat(0, is_taken=True)
    one.describe(0, "ä" * 5000)
    assert one.status() == "ä" * 512 + " (1 workers)"


# What they have counted.


def report(**counts: float) -> WorkerReport:
    """A report with a counter, a histogram, a gauge and an oldest date, as `counts` has them."""
    families = [
        Family("requests_total", "counter", "", [_sample(counts, "requests")]),
        Family("connections", "gauge", "", [_sample(counts, "connections")]),
        Family("seconds", "histogram", "", [_sample(counts, "seconds")]),
        Family("first_total", "counter", "", [_sample(counts, "first")], "min"),
    ]
    return msgspec.structs.replace(worker_report(), metrics=families)


def _sample(counts: dict[str, float], name: str) -> Sample:
    return Sample("", {}, counts.get(name, 0))


def values(families: list[Family]) -> dict[str, float]:
    return {family.name: family.samples[0].value for family in families}


def test_a_successor_goes_on_counting() -> None:
    one = Ledger(2)
    told = one.books(0).enter(report(requests=5, connections=7, seconds=2, first=3))
    assert values(told.metrics) == {
        "requests_total": 5,
        "connections": 7,
        "seconds": 2,
        "first_total": 3,
    }
    assert values(one.counted(0)) == {"requests_total": 5, "seconds": 2}, "what adds up"
    assert one.counted(1) == []

    books = one.books(0)
    for requests in (0, 1, 4):
        told = books.enter(report(requests=requests, connections=1, seconds=1, first=9))
        found = values(told.metrics)
        assert found == {
            "requests_total": 5 + requests,
            "connections": 1,
            "seconds": 3,
            "first_total": 9,
        }
        assert list(found) == ["requests_total", "connections", "seconds", "first_total"]
    third = one.books(0).enter(report(requests=1))
    assert values(third.metrics)["requests_total"] == 10


def test_what_only_a_predecessor_had_stays() -> None:
    one = Ledger(1)
    before = report()
    errors = Family("errors_total", "counter", "", [Sample("", {"code": "x"}, 2)])
    one.books(0).enter(msgspec.structs.replace(before, metrics=[errors]))
    told = one.books(0).enter(before)
    assert told.metrics[-1] == errors


def test_what_was_told_is_known_though_the_worker_is_killed() -> None:
    one = Ledger(1)

    def tell_and_die() -> None:
        one.books(0).enter(report(requests=3))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_another_process(tell_and_die) == -signal.SIGKILL
    assert values(one.counted(0))["requests_total"] == 3


# The KMS root.


def test_the_root_that_one_process_has_learnt_all_know() -> None:
    one = Ledger(2)
    assert one.root.digest() == b""
    assert in_another_process(lambda: one.root.learn(b"r" * 32)) == 0
    assert one.root.digest() == b"r" * 32
    one.root.learn(b"s" * 32)
    assert one.root.digest() == b"r" * 32

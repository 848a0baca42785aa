from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
from tests.integration.harness import eventually
from tests.ops.reports import worker_report

from dstack_mesh.ops.families import Family, Sample
from dstack_mesh.ops.report import Incident, WorkerReport
from dstack_mesh.workers import mailbox
from dstack_mesh.workers.ledger import Ledger
from dstack_mesh.workers.mailbox import Ask, Mailbox, Piece, socket_pairs

LOOSE = 10.0
PATIENCE = 0.25


class Workers:
    """Mailboxes in one process, each with a report of its own."""

    def __init__(self, count: int) -> None:
        self.pairs = socket_pairs(count)
        self.ledger = Ledger(count)
        for index in range(count):
            self.ledger.seat(index, is_taken=True)
        self.boxes = [Mailbox(index, self.pairs, self.ledger) for index in range(count)]
        self.asked: list[tuple[int, bool]] = []
        self.own = [worker_report(pid=100 + index) for index in range(count)]

    def serve(self, *indexes: int) -> None:
        loop = asyncio.get_running_loop()
        for index in indexes:
            self.boxes[index].serve(loop, functools.partial(self._report, index))

    async def _report(self, index: int, include_backend: bool) -> WorkerReport:
        self.asked.append((index, include_backend))
        return self.own[index]

    async def collect(self, index: int, include_backend: bool = False) -> list[WorkerReport]:
        async with asyncio.timeout(LOOSE):
            return await self.boxes[index].collect(self.own[index], include_backend)

    def send(self, index: int, message: object) -> None:
        """Put a message into the mailbox of a worker, as a sibling would."""
        packed = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.pairs[index][1].send(packed)

    def received(self, index: int) -> list[Ask]:
        """Take what lies in the mailbox of a worker that does not serve."""
        found: list[Ask] = []
        while True:
            try:
                packed = self.pairs[index][0].recv(1 << 17)
            except BlockingIOError:
                return found
            found.append(msgspec.msgpack.decode(packed, type=Ask))

    def close(self) -> None:
        for pair in self.pairs:
            for sock in pair:
                sock.close()


@pytest.fixture
async def three() -> AsyncIterator[Workers]:
    one = Workers(3)
    yield one
    loop = asyncio.get_running_loop()
    for reading, _ in one.pairs:
        loop.remove_reader(reading)
    one.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "PATIENCE", PATIENCE)


def large(pid: int) -> WorkerReport:
    """A report of about 1 MB, much more than a socket's buffer takes."""
    samples = [Sample("", {"n": f"{n:040}"}, n) for n in range(10_000)]
    incidents = [Incident(at=n, direction="inbound", code="x" * 50) for n in range(2_000)]
    report = worker_report(pid, incidents=incidents)
    return msgspec.structs.replace(report, metrics=[Family("big", "counter", "Big.", samples)])


async def test_all_answer_in_their_order(three: Workers) -> None:
    three.serve(0, 1, 2)
    for asker in range(3):
        assert [one.pid for one in await three.collect(asker)] == [100, 101, 102]


async def test_only_the_others_are_asked_and_as_one_was_asked(three: Workers) -> None:
    three.serve(0, 1, 2)
    await three.collect(1, include_backend=True)
    assert sorted(three.asked) == [(0, True), (2, True)]
    three.asked.clear()
    await three.collect(0)
    assert sorted(three.asked) == [(1, False), (2, False)]


async def test_a_report_arrives_as_it_was(three: Workers) -> None:
    three.serve(0, 1, 2)
    three.own[1] = worker_report(101, targets=[], settings={"inbound.allow": "self"})
    found = await three.collect(0)
    assert found[1] == three.own[1]


@pytest.mark.usefixtures("impatient")
async def test_a_silent_one_is_waited_for_only_so_long_and_named(three: Workers) -> None:
    three.serve(0, 2)
    started = time.monotonic()
    found = await three.collect(0)
    assert 0.9 * PATIENCE <= time.monotonic() - started < PATIENCE + 2
    assert [one.pid for one in found] == [100, 0, 102]
    silent = found[1].status
    assert not silent.readiness.ready
    assert silent.readiness.checks["workers"].reason == "worker 1 does not answer"
    assert (silent.workers, silent.traffic, found[1].metrics) == (0, {}, [])


async def test_who_is_not_there_is_not_asked_and_what_it_counted_stays(three: Workers) -> None:
    three.serve(0, 2)
    three.ledger.books(1).enter(worker_report(101))
    three.ledger.seat(1, is_taken=False)
    started = time.monotonic()
    found = await three.collect(0)
    assert time.monotonic() - started < mailbox.PATIENCE / 2
    assert three.received(1) == []
    assert [one.pid for one in found] == [100, 0, 102]
    check = found[1].status.readiness.checks["workers"]
    assert (check.ok, check.reason) == (False, "worker 1 is not running")
    assert found[1].metrics == worker_report().metrics


async def test_nobody_is_waited_for_longer_than_needed(three: Workers) -> None:
    three.serve(0, 1, 2)
    started = time.monotonic()
    await three.collect(0)
    assert time.monotonic() - started < mailbox.PATIENCE / 2


async def test_large_reports_come_in_pieces(three: Workers) -> None:
    three.serve(0, 1, 2)
    three.own[1], three.own[2] = large(101), large(102)
    packed = msgspec.msgpack.encode(three.own[1])
    assert len(packed) > 20 * 32 * 1024, "more than the socket takes at once"
    assert await three.collect(0) == three.own


async def test_many_questions_at_once_all_have_their_answers(three: Workers) -> None:
    three.serve(0, 1, 2)
    three.own[1] = large(101)
    asked = [three.collect(asker) for asker in (0, 2, 0, 2)]
    for found in await asyncio.gather(*asked):
        assert found == three.own


async def test_what_was_asked_before_its_time_is_not_answered(three: Workers) -> None:
    """It lay in the mailbox while nobody was in the place."""
    now = time.monotonic_ns()
    three.send(1, Ask(0, now - int((mailbox.PATIENCE + 1) * 1e9), include_backend=False))
    three.serve(0, 1, 2)
    await three.collect(0)
    assert sorted(three.asked) == [(1, False), (2, False)]


@pytest.mark.usefixtures("impatient")
async def test_stale_answers_are_nobodys(three: Workers) -> None:
    three.serve(0)
    await three.collect(0)
    (old,) = three.received(1)
    packed = msgspec.msgpack.encode(worker_report(pid=666))
    for number in (old.number, 1, 2):
        three.send(0, Piece(1, number, 0, 1, packed))
    three.serve(1, 2)
    three.received(2)
    found = await three.collect(0)
    assert found[1].pid in (0, 101)
    assert 666 not in [one.pid for one in await three.collect(0)]


async def test_a_successor_does_not_ask_by_numbers_of_its_predecessor(three: Workers) -> None:
    """Else pieces of answers to both could be put together."""
    numbers = []
    for _ in range(2):
        box = Mailbox(0, three.pairs, three.ledger)
        asking = asyncio.ensure_future(box.collect(three.own[0], include_backend=False))
        await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        asking.cancel()
        numbers += [ask.number for ask in three.received(1)]
    assert numbers[0] < numbers[1]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1 no message",
        json.dumps({"no": "message"}).encode(),
        msgspec.msgpack.encode(["Ask", 1]),
        msgspec.msgpack.encode(["Other", 1, 2, 3]),
    ],
)
async def test_what_is_no_message_ends_nothing(
    three: Workers, message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    three.serve(0, 1, 2)
    with caplog.at_level(logging.ERROR):
        three.send(0, message)
        three.send(1, message)
        assert [one.pid for one in await three.collect(0)] == [100, 101, 102]
    assert {record.message for record in caplog.records} == {"worker_message_unusable"}


@pytest.mark.usefixtures("impatient")
async def test_an_answer_that_is_no_report_counts_as_none(three: Workers) -> None:
    three.serve(0, 2)
    asking = asyncio.ensure_future(three.collect(0))
    asks: list[Ask] = []

    def arrived() -> bool:
        asks.extend(three.received(1))
        return bool(asks)

    await eventually(arrived)
    three.send(0, Piece(1, asks[0].number, 0, 1, b"no report"))
    three.send(0, Piece(1, asks[0].number, 7, 1, b"no such part"))
    assert [one.pid for one in await asking] == [100, 0, 102]


@pytest.mark.usefixtures("impatient")
async def test_a_full_mailbox_holds_nobody_else_up(three: Workers) -> None:
    """Its worker is dead, or stands still: the others are asked all the same."""
    three.serve(0, 2)
    with contextlib.suppress(BlockingIOError):
        while True:
            three.send(1, bytes(1000))
    started = time.monotonic()
    assert [one.pid for one in await three.collect(0)] == [100, 0, 102]
    assert time.monotonic() - started < PATIENCE + 2
    assert (2, False) in three.asked


@pytest.mark.usefixtures("impatient")
async def test_who_asked_and_does_not_read_is_given_up(three: Workers) -> None:
    three.serve(1)
    three.own[1] = large(101)
    tasks = asyncio.all_tasks()
    three.send(1, Ask(0, time.monotonic_ns(), include_backend=False))
    await eventually(lambda: bool(three.asked))
    await eventually(lambda: asyncio.all_tasks() == tasks)

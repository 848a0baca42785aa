from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dstack_mesh.relay.deadlines import NEVER, Timeouts
from dstack_mesh.relay.worker import READ_BUFFER_BYTES, Worker


class FakeTransport:
    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


class FakeUpstream:
    def __init__(self, deadline: float = NEVER) -> None:
        self.transport = FakeTransport()
        self.expires_at = NEVER
        self.deadline = deadline
        self.expired = asyncio.Event()

    def expire(self, now: float) -> None:
        self.deadline = NEVER
        self.expired.set()


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    one = Worker(asyncio.get_running_loop(), Timeouts(head=0.1))
    yield one
    one.close()


async def test_the_buffer_can_be_read_into(worker: Worker) -> None:
    assert len(worker.buffer) == READ_BUFFER_BYTES
    assert not worker.buffer.readonly


@pytest.mark.parametrize(
    ("idle", "upstream_idle"), [(10.0, 8.0), (300.0, 240.0), (600.0, 480.0), (NEVER, 480.0)]
)
async def test_an_upstream_is_let_go_before_the_other_side_does(
    idle: float, upstream_idle: float
) -> None:
    worker = Worker(asyncio.get_running_loop(), Timeouts(idle=idle))
    assert worker.upstream_idle == pytest.approx(upstream_idle)
    assert worker.upstream_idle < min(idle, 600.0), "gateways cut after 10 silent minutes"
    worker.close()


async def test_connections_age_and_not_all_at_once(worker: Worker) -> None:
    upstreams = [FakeUpstream() for _ in range(50)]
    before = worker.clock()
    for one in upstreams:
        worker.admit_upstream(one)
    after = worker.clock()
    ages = {one.expires_at for one in upstreams}
    assert len(ages) > 1
    assert before + 54 * 60 <= min(ages)
    assert max(ages) <= after + 60 * 60
    assert worker.upstreams == set(upstreams)


async def test_an_admitted_connections_deadline_is_watched(worker: Worker) -> None:
    one = FakeUpstream(deadline=0.0)
    worker.admit_upstream(one)
    async with asyncio.timeout(5):
        await one.expired.wait()


async def test_a_forgotten_connection_is_let_go(worker: Worker) -> None:
    gone, stays = FakeUpstream(), FakeUpstream()
    worker.admit_upstream(gone)
    worker.admit_upstream(stays)
    worker.forget_upstream(gone)
    worker.forget_upstream(gone)
    assert worker.upstreams == {stays}
    gone.deadline = stays.deadline = 0.0
    async with asyncio.timeout(5):
        await stays.expired.wait()
    assert not gone.expired.is_set()


async def test_close_ends_every_connection_and_the_sweep(worker: Worker) -> None:
    upstreams = [FakeUpstream(), FakeUpstream()]
    for one in upstreams:
        worker.admit_upstream(one)
    worker.close()
    assert [one.transport.aborted for one in upstreams] == [1, 1]
    for one in upstreams:
        one.deadline = 0.0
    later = FakeUpstream(deadline=0.0)
    worker.deadlines.watch(later)  # two ticks of a sweep that goes on
    async with asyncio.timeout(5):
        await later.expired.wait()
    assert not any(one.expired.is_set() for one in upstreams)

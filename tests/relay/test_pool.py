from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.relay.fakes import FakeConnector, FakeTransport

from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.pool import MAX_LANES, Pool
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.relay.worker import Worker


class Makes:
    """Makes connectors and remembers how many."""

    def __init__(self) -> None:
        self.made: list[FakeConnector] = []

    def __call__(self) -> FakeConnector:
        self.made.append(FakeConnector())
        return self.made[-1]


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    one = Worker(asyncio.get_running_loop(), Timeouts())
    yield one
    one.close()
    await asyncio.sleep(0)


def admitted(lane: Lane, generation: int = 1) -> Upstream:
    upstream = Upstream(lane)
    upstream.connection_made(FakeTransport(upstream))
    upstream.admit(None, generation)
    return upstream


async def test_one_destination_has_one_lane(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    lane = pool.lane(("backend", 1), make)
    assert pool.lane(("backend", 1), make) is lane
    assert pool.lane(("backend", 2), make) is not lane
    assert len(make.made) == 2
    assert lane.connector is make.made[0]
    assert lane.worker is worker


async def test_many_destinations_cost_what_their_connections_cost(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    used = pool.lane("used", make)
    upstream = admitted(used)
    used.release(upstream, worker.clock())
    unused = pool.lane("unused", make)
    for number in range(MAX_LANES - 2):
        pool.lane(number, make)
    assert not unused.retired
    pool.lane("one too many", make)
    assert unused.retired
    assert not used.retired
    assert pool.lane("used", make) is used
    assert pool.lane("unused", make) is not unused


async def test_a_lane_counts_its_connections(worker: Worker) -> None:
    lane = Pool(worker).lane("x", Makes())
    first, second = admitted(lane), admitted(lane)
    assert lane.open == 2
    first.transport.abort()
    await asyncio.sleep(0)
    assert lane.open == 1
    never_ready = Upstream(lane)
    never_ready.connection_made(FakeTransport(never_ready))
    never_ready.transport.abort()
    await asyncio.sleep(0)
    assert lane.open == 1
    second.transport.abort()
    await asyncio.sleep(0)
    assert lane.open == 0


async def test_a_retired_lane_keeps_no_connection(worker: Worker) -> None:
    lane = Pool(worker).lane("x", Makes())
    upstream = admitted(lane)
    lane.retired = True
    lane.release(upstream, worker.clock())
    assert upstream.transport.is_closing()
    assert lane.idle == []


async def test_draining_ends_what_is_idle_under_an_older_identity(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    lanes = [pool.lane(name, make) for name in "xy"]
    old = [admitted(lane, 1) for lane in lanes]
    busy = admitted(lanes[0], 1)
    for lane, upstream in zip(lanes, old, strict=True):
        lane.release(upstream, worker.clock())
    for connector in make.made:
        connector.number = 2
    new = admitted(lanes[0], 2)
    lanes[0].release(new, worker.clock())
    pool.drain()
    assert [one.transport.is_closing() for one in (*old, busy, new)] == [True, True, False, False]
    assert lanes[0].idle == [new]
    assert lanes[1].idle == []
    lanes[0].release(busy, worker.clock())
    assert busy.transport.is_closing(), "it ends with its exchange"


async def test_draining_leaves_what_may_be_used(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    lane = pool.lane("x", make)
    upstream = admitted(lane)
    lane.release(upstream, worker.clock())
    pool.drain()
    assert lane.take(worker.clock()) is upstream

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest
from tests.relay.fakes import FakeConnector, FakeTransport

from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.upstream import Lane, Upstream
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


async def test_a_lane_ends_with_the_last_that_refers_to_it(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    first = pool.lane("x", make)
    del first
    gc.collect()
    second = pool.lane("x", make)
    assert second.connector is make.made[1]


async def test_a_connection_keeps_its_lane(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    lane = pool.lane("x", make)
    upstream = admitted(lane)
    lane.release(upstream)
    del lane, upstream
    gc.collect()
    lane = pool.lane("x", make)
    assert len(make.made) == 1
    assert lane.take() is not None


async def test_a_lane_goes_with_its_last_connection(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    upstream = admitted(pool.lane("x", make))
    upstream.transport.abort()
    del upstream
    await asyncio.sleep(0)
    gc.collect()
    pool.lane("x", make)
    assert len(make.made) == 2


async def test_draining_ends_what_is_idle_under_an_older_identity(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    lanes = [pool.lane(name, make) for name in "xy"]
    old = [admitted(lane, 1) for lane in lanes]
    busy = admitted(lanes[0], 1)
    for lane, upstream in zip(lanes, old, strict=True):
        lane.release(upstream)
    for connector in make.made:
        connector.number = 2
    new = admitted(lanes[0], 2)
    lanes[0].release(new)
    pool.drain()
    assert [one.transport.is_closing() for one in (*old, busy, new)] == [True, True, False, False]
    assert lanes[0].idle == [new]
    assert lanes[1].idle == []
    lanes[0].release(busy)
    assert busy.transport.is_closing(), "it ends with its exchange"


async def test_draining_leaves_what_may_be_used(worker: Worker) -> None:
    pool, make = Pool(worker), Makes()
    lane = pool.lane("x", make)
    upstream = admitted(lane)
    lane.release(upstream)
    pool.drain()
    assert lane.take() is upstream

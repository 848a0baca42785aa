from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.relay.fakes import rig

from dstack_mesh.errors import BadRequest
from dstack_mesh.relay import service as module
from dstack_mesh.relay.deadlines import NEVER, Timeouts
from dstack_mesh.relay.service import Recorder, Service
from dstack_mesh.relay.tally import Tally
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.request_line import parse_request_line


class FakeConnection:
    def __init__(self, waiting_since: float = NEVER) -> None:
        self.drained = self.was_cut = 0
        self.since = waiting_since
        self.expired = False

    def waiting_since(self) -> float:
        return self.since

    def expire(self, now: float) -> None:
        self.expired = True

    def drain(self) -> None:
        self.drained += 1

    def cut(self) -> None:
        self.was_cut += 1


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    worker = Worker(asyncio.get_running_loop(), Timeouts())
    yield Service(worker, "inbound", max_connections=2)
    worker.close()


async def test_the_limit(service: Service) -> None:
    one, two, three = (FakeConnection() for _ in range(3))
    assert service.opened(one)
    assert service.has_room()
    assert service.opened(two)
    assert not service.has_room()
    assert not service.opened(three)
    assert service.connections == {one, two}
    service.closed(three)  # it was never in the books
    assert not service.has_room()
    service.closed(one)
    assert service.opened(three)


async def test_draining_waits_for_the_last(service: Service) -> None:
    one, two = FakeConnection(), FakeConnection()
    service.opened(one)
    service.opened(two)
    drain = asyncio.create_task(service.drain())
    await asyncio.sleep(0)
    assert service.draining
    assert (one.drained, two.drained) == (1, 1)
    service.closed(one)
    await asyncio.sleep(0)
    assert not drain.done()
    service.closed(two)
    async with asyncio.timeout(5):
        await drain


async def test_draining_takes_connections_that_come_meanwhile(service: Service) -> None:
    one, late = FakeConnection(), FakeConnection()
    service.opened(one)
    drain = asyncio.create_task(service.drain())
    await asyncio.sleep(0)
    service.opened(late)  # its handshake ended only now
    service.closed(one)
    await asyncio.sleep(0)
    assert not drain.done()
    service.closed(late)
    async with asyncio.timeout(5):
        await drain


async def test_draining_without_connections_is_over_at_once(service: Service) -> None:
    async with asyncio.timeout(5):
        await service.drain()
    assert service.draining


async def test_abort_cuts_all(service: Service) -> None:
    connections = [FakeConnection(), FakeConnection()]
    for one in connections:
        service.opened(one)
    service.abort()
    assert [one.was_cut for one in connections] == [1, 1]
    gone = asyncio.create_task(service.gone())
    service.closed(connections[0])
    await asyncio.sleep(0)
    assert not gone.done()
    service.closed(connections[1])
    async with asyncio.timeout(0.5):
        await gone


async def test_abort_does_not_wait_for_ever(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ABORT_SECONDS", 0.02)
    service.opened(FakeConnection())
    service.abort()
    async with asyncio.timeout(5):
        await service.gone()


async def test_who_has_waited_longest_gives_way(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    now = service.worker.clock()
    fresh = FakeConnection(now - 14)
    silent = FakeConnection(now - 16)
    for one in (fresh, silent):
        assert service.opened(one)
    newcomer = FakeConnection()
    assert service.opened(newcomer)
    assert silent.expired
    assert not fresh.expired
    assert service.connections == {fresh, newcomer}
    service.closed(silent)  # which its transport tells later
    assert not service.opened(FakeConnection()), "who has just come stays"
    assert not service.give_way()
    for _ in range(100):
        service.opened(FakeConnection())
    said = [one for one in caplog.records if one.getMessage() == "connections_at_limit"]
    assert len(said) == 1, "a flood is not one of the log"
    assert said[0].fields == {  # type: ignore[attr-defined]
        "listener": "inbound",
        "open": 1,
        "limit": 2,
        "setting": "MESH_MAX_CONNECTIONS",
        "refused": 0,
        "gave_way": 1,
    }


class FakeExchange:
    """An exchange that has ended, to an upstream whose lane may count for itself."""

    def __init__(self, status: int = 200, code: str = "", tally: Tally | None = None) -> None:
        self.line = parse_request_line(b"GET / HTTP/1.1")
        self.status, self.code = status, code
        self.bytes_up, self.bytes_down = 1, 2
        self.started, self.finished = 10.0, 10.5
        self.lane = None if tally is None else FakeLane(tally)


class FakeLane:
    def __init__(self, tally: Tally) -> None:
        self.tally = tally


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker(asyncio.get_running_loop(), Timeouts())
    yield worker
    worker.close()


def told(where: list[tuple[str, object]]) -> Recorder:
    return lambda direction, exchange: where.append((direction, exchange))


async def test_an_exchange_is_recorded_with_its_direction(worker: Worker) -> None:
    records: list[tuple[str, object]] = []
    service = Service(worker, "inbound", max_connections=1, record=told(records))
    exchange = FakeExchange()
    service.record(exchange)  # type: ignore[arg-type]
    assert records == [("inbound", exchange)]
    Service(worker, "inbound", max_connections=1).record(exchange)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "code", "has_failed"),
    [
        (200, "", False),
        (101, "", False),
        (404, "", False),
        (500, "", True),
        (0, "", True),
        (403, "policy_denied", True),
        (200, "upstream_closed", True),
    ],
)
async def test_what_failed_is_told_apart(
    worker: Worker, status: int, code: str, has_failed: bool
) -> None:
    failures: list[tuple[str, object]] = []
    service = Service(worker, "inbound", max_connections=1, failed=told(failures))
    service.record(FakeExchange(status, code))  # type: ignore[arg-type]
    assert bool(failures) is has_failed


async def test_an_exchange_is_counted_once_where_its_lane_says(worker: Worker) -> None:
    own, agent = Tally("outbound"), Tally("agent")
    records: list[tuple[str, object]] = []
    service = Service(worker, "outbound", max_connections=1, tally=own, record=told(records))
    exchange = FakeExchange(tally=agent)
    service.record(exchange)  # type: ignore[arg-type]
    assert (own.requests, agent.requests) == ({}, {(b"GET", 2, ""): 1})
    assert records == [("agent", exchange)]
    service.record(FakeExchange())  # type: ignore[arg-type]
    assert own.requests == {(b"GET", 2, ""): 1}
    assert (own.bytes_up, own.bytes_down, own.seconds) == (1, 2, 0.5)


async def test_a_refused_head_is_counted_and_told(worker: Worker) -> None:
    tally = Tally("inbound")
    refusals: list[tuple[str, str, str]] = []
    service = Service(
        worker,
        "inbound",
        max_connections=1,
        tally=tally,
        refused=lambda direction, error, named: refusals.append((direction, error.code, named)),
    )
    service.refused(BadRequest("no"), "r-1")
    assert tally.requests == {(b"other", 4, "bad_request"): 1}
    assert refusals == [("inbound", "bad_request", "r-1")]


async def test_real_connections_come_and_go() -> None:
    async with rig(max_connections=2) as one:
        other = one.accept()
        assert len(one.service.connections) == 2
        refused = one.accept()
        assert b"503" in refused.take().split(b"\r\n")[0]
        assert len(one.service.connections) == 2
        other.break_off()
        assert len(one.service.connections) == 1
        async with asyncio.timeout(5):
            await one.service.drain()
        assert one.client.lost, "an idle connection is closed"
        assert one.service.connections == set()

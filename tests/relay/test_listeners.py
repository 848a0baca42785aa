from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.integration.harness import Client, eventually, request

from dstack_mesh.listen import bind, bound_address
from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.interfaces import Handler, Plan
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.listeners import Listeners, PlainIntake
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import RequestLine


class Hello(Handler[Plan]):
    """Answers everything itself."""

    def plan(self, line: RequestLine, block: bytes) -> Plan:
        return Plan(parse_request_fields(block, line.minor, frozenset(), line.authority))

    def route(self, line: RequestLine, plan: Plan, last: Route | None = None) -> Answer:
        return Answer(200, b"hello\n", "text/plain")


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    one = Worker(asyncio.get_running_loop(), Timeouts(head=0.1))
    yield one
    one.close()


@contextlib.asynccontextmanager
async def serving(
    worker: Worker, address: TcpAddress | UnixAddress, most: int = 10
) -> AsyncIterator[tuple[Listeners, Service, TcpAddress | UnixAddress]]:
    service = Service(worker, "outbound", max_connections=most)
    listeners = Listeners(worker.loop)
    with bind(address) as sock:
        listeners.serve("outbound", sock, service, Hello())
        yield listeners, service, bound_address(sock)
        listeners.abort()
        service.abort()
        await eventually(lambda: not service.connections)


LOOPBACK = TcpAddress("127.0.0.1", 0)


async def hello(client: Client) -> None:
    await client.send(request())
    assert (await client.answer()).body == b"hello\n"


async def test_plain_connections_are_served(worker: Worker) -> None:
    async with serving(worker, LOOPBACK) as (_, service, where):
        assert isinstance(where, TcpAddress)
        async with Client.connect(where) as one, Client.connect(where) as two:
            await hello(one)
            await hello(two)
            no_delay = [
                one.transport.get_extra_info("socket").getsockopt(  # type: ignore[attr-defined]
                    socket.IPPROTO_TCP, socket.TCP_NODELAY
                )
                for one in service.connections
            ]
            assert no_delay == [1, 1], "small answers go at once"


async def test_unix_sockets_are_served(worker: Worker, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    async with serving(worker, UnixAddress(path)):
        reader, writer = await asyncio.open_unix_connection(path)
        await hello(Client(reader, writer))
        writer.close()
        await writer.wait_closed()


async def test_a_listener_that_stops_serves_those_it_has(worker: Worker) -> None:
    async with serving(worker, LOOPBACK) as (listeners, service, where):
        assert isinstance(where, TcpAddress)
        async with Client.connect(where) as one:
            await hello(one)
            listeners.stop("outbound")
            listeners.stop("one that never was")
            async with Client.connect(where) as late:
                await late.send(request())
                await hello(one)
                assert len(service.connections) == 1
                late.reset()


async def test_who_has_waited_long_gives_way_to_a_newcomer(worker: Worker) -> None:
    async with serving(worker, LOOPBACK, most=2) as (_, _, where):
        assert isinstance(where, TcpAddress)
        async with Client.connect(where) as first, Client.connect(where) as second:
            await hello(first)
            async with Client.connect(where) as third:
                assert (await third.answer()).error == "overloaded", "both have just come"
            await asyncio.sleep(0.15)  # longer than a head may take
            await hello(first)
            async with Client.connect(where) as third:
                await hello(third)
                assert await second.closed() == b"", "it never asked for anything"
                await hello(first)


async def test_what_has_no_protocol_yet_is_closed_at_the_end(worker: Worker) -> None:
    service = Service(worker, "outbound", max_connections=10)
    intake = PlainIntake(worker.loop, lambda: service.protocol(Hello()))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    intake.take(ours)
    intake.abort()
    await eventually(lambda: not intake._opening)
    assert theirs.recv(1) == b""
    theirs.close()
    assert not service.connections


async def test_a_socket_that_the_loop_does_not_take_is_closed(worker: Worker) -> None:
    intake = PlainIntake(
        worker.loop, lambda: Service(worker, "x", max_connections=1).protocol(Hello())
    )
    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
    intake.take(ours)
    await eventually(lambda: not intake._opening)
    assert ours.fileno() == -1
    theirs.close()


async def test_a_share_counts_who_is_there_and_who_is_about_to_be(worker: Worker) -> None:
    """Where several processes accept on the same socket."""
    counts: dict[str, Callable[[], int]] = {}

    def share_of(name: str, count: Callable[[], int]) -> None:
        counts[name] = count

    service = Service(worker, "outbound", max_connections=10)
    listeners = Listeners(worker.loop, share_of)
    with bind(LOOPBACK) as sock, bind(LOOPBACK) as tls:
        listeners.serve("outbound", sock, service, Hello())
        listeners.serve_tls("inbound", tls, service, lambda accepted: None, lambda: 5)
        where = bound_address(sock)
        assert isinstance(where, TcpAddress)
        async with Client.connect(where) as client:
            await hello(client)
            assert counts["outbound"]() == 1
            assert counts["inbound"]() == 6, "handshakes count too"
        await eventually(lambda: counts["outbound"]() == 0)
        listeners.abort()

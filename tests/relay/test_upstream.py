from __future__ import annotations

import asyncio

from tests.relay.fakes import FakeTransport, open_one, rig
from tests.relay.tls_scene import tcp_pair

from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.upstream import Upstream


class Sink:
    """An exchange that remembers what it was told."""

    def __init__(self) -> None:
        self.data = b""
        self.lost: list[tuple[Exception | None, bool]] = []
        self.writable: list[bool] = []

    def response_data(self, data: bytes) -> None:
        self.data += data

    def upstream_lost(self, upstream: Upstream, exc: Exception | None) -> None:
        self.lost.append((exc, upstream.clean_end))

    def upstream_writable(self, writable: bool) -> None:
        self.writable.append(writable)


async def test_what_comes_goes_to_the_exchange() -> None:
    async with rig() as one:
        opened = open_one(one)
        sink = opened.upstream.exchange = Sink()
        opened.transport.receive(b"abc")
        assert sink.data == b"abc"


async def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    async with rig() as one:
        opened = open_one(one, idle=True)
        opened.transport.receive(b"HTTP/1.1 200 OK\r\n\r\n")
        assert opened.transport.aborted
        assert one.lane.take(one.worker.clock()) is None


async def test_the_exchange_learns_how_the_connection_ended() -> None:
    async with rig() as one:
        orderly, broken = open_one(one), open_one(one)
        sinks = orderly.upstream.exchange, broken.upstream.exchange = Sink(), Sink()
        orderly.transport.receive_eof()
        error = ConnectionResetError("reset")
        broken.transport.break_off(error)
        await one.turn()
        assert [sink.lost for sink in sinks] == [[(None, True)], [(error, False)]]
        assert orderly.upstream.exchange is None
        assert (broken.upstream.gone, broken.upstream.failure) == (True, error)
        assert one.worker.upstreams == set()


async def test_the_exchange_gets_the_answer_that_a_reset_followed() -> None:
    """A server that refuses a body may answer, and close with the rest of it unread."""
    async with rig() as one:
        ours, theirs = tcp_pair()
        upstream = Upstream(one.lane)
        await one.worker.loop.create_connection(upstream.as_protocol, sock=ours)
        upstream.admit(None, 0)
        sink = upstream.exchange = Sink()
        upstream.write(b"a request")
        theirs.sendall(b"HTTP/1.1 413 Content Too Large\r\n\r\n")
        theirs.close()
        upstream.write(b"its body")
        async with asyncio.timeout(10):
            while not sink.lost:  # noqa: ASYNC110 - the event loop's own steps
                await asyncio.sleep(0)
        assert sink.data == b"HTTP/1.1 413 Content Too Large\r\n\r\n"
        assert [(type(exc), clean) for exc, clean in sink.lost] in (
            [[(ConnectionResetError, False)], [(BrokenPipeError, False)]]
        )
        assert one.worker.upstreams == set()


async def test_the_exchange_learns_whether_there_is_room() -> None:
    async with rig() as one:
        opened = open_one(one)
        sink = opened.upstream.exchange = Sink()
        opened.transport.stall()
        opened.upstream.write(b"x" * 200_000)
        assert (sink.writable, opened.upstream.writable) == ([False], False)
        opened.transport.flow()
        assert (sink.writable, opened.upstream.writable) == ([False, True], True)
        opened.upstream.exchange = None
        opened.transport.stall()
        opened.upstream.write(b"x" * 200_000)
        opened.transport.flow()
        assert sink.writable == [False, True]


async def test_nothing_is_written_to_a_connection_on_its_way_out() -> None:
    async with rig() as one:
        opened = open_one(one)
        opened.transport.close()
        opened.upstream.write(b"x")
        assert opened.transport.take() == b""


async def test_a_connection_that_is_gone_is_not_taken_into_the_books() -> None:
    async with rig() as one:
        upstream = Upstream(one.lane)
        transport = FakeTransport(upstream)
        upstream.connection_made(transport)
        transport.break_off()
        upstream.admit(None, 1)
        assert one.worker.upstreams == set()
        one.lane.release(upstream, one.worker.clock())
        assert one.lane.idle == []


async def test_a_connection_lives_for_an_hour_at_most() -> None:
    async with rig() as one:
        now = one.worker.clock()
        ages = [open_one(one).upstream.expires_at - now for _ in range(20)]
        assert all(3200 < age <= 3601 for age in ages)
        assert len(set(ages)) > 1


async def test_an_idle_connection_is_closed_in_order_after_its_time() -> None:
    async with rig() as one:
        idle = open_one(one, idle=True)
        now = one.worker.clock()
        assert now < idle.upstream.deadline <= now + one.worker.upstream_idle
        idle.upstream.expire(idle.upstream.deadline)
        assert (idle.transport.is_closing(), idle.transport.aborted) == (True, False)
        assert one.lane.take(one.worker.clock()) is None
        await one.turn()
        assert one.lane.idle == []


async def test_a_connection_in_use_does_not_expire() -> None:
    async with rig() as one:
        opened = open_one(one)
        opened.upstream.exchange = Sink()
        opened.upstream.expire(0)
        assert not opened.transport.is_closing()


async def test_a_connection_that_does_not_come_to_close_is_cut() -> None:
    class Stuck(FakeTransport):
        """Closes only once what was written is taken, which is never."""

        def close(self) -> None:
            self._closing = True

        def abort(self) -> None:
            self.aborted = True
            asyncio.get_running_loop().call_soon(self._lose, None)

    async with rig() as one:
        upstream = Upstream(one.lane)
        transport = Stuck(upstream)
        upstream.connection_made(transport)
        upstream.admit(None, 1)
        upstream.close()
        assert (transport.aborted, upstream.deadline < NEVER) == (False, True)
        upstream.expire(upstream.deadline)
        assert transport.aborted

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from tests.integration.harness import eventually
from tests.relay.fakes import TIMEOUTS, FakeTransport, Rig, rig
from tests.relay.messages import GET, MEBIBYTE, OK, SWITCH, UPGRADE, bodies, echo, problem

from dstack_mesh.errors import MeshError
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import NEVER, Timeouts
from dstack_mesh.wire.request_line import RequestLine

# The limit on connections.


async def test_a_connection_over_the_limit_is_told_so() -> None:
    async with rig(max_connections=1) as one:
        second = one.accept()
        answer = second.take()
        assert problem(answer) == (503, "overloaded")
        assert b"\r\nRetry-After: 1\r\n" in answer
        assert b"\r\nConnection: close\r\n" in answer
        assert (second.ended, len(one.handler.connections)) == (True, 1)
        second.receive(GET % b"1")
        await one.turn()
        assert one.connector.asked == []
        assert one.downstreams[1].deadline <= one.worker.clock() + TIMEOUTS.linger
        second.receive_eof()
        await one.turn()
        assert second.lost
        assert len(one.service.connections) == 1


async def test_one_connection_less_makes_room() -> None:
    async with rig(max_connections=1) as one:
        one.client.break_off()
        second = one.accept()
        assert second.take() == b""


# Lingering: RFC 9112 section 9.6.


async def refused(one: Rig, *, tls: bool = False) -> FakeTransport:
    client = one.accept(tls=tls)
    client.receive(b"nonsense\r\n\r\n")
    assert problem(client.take()) == (400, "bad_request")
    return client


async def test_after_a_refusal_what_comes_is_read_and_dropped() -> None:
    async with rig() as one:
        client = await refused(one)
        client.receive(MEBIBYTE)
        client.receive(GET % b"1")
        await one.turn()
        assert (client.waiting, client.take(), one.connector.asked) == (0, b"", [])
        client.receive_eof()
        await one.turn()
        assert (client.lost, client.aborted) == (True, False)


async def test_after_a_refusal_the_connection_ends_even_if_the_client_does_not() -> None:
    async with rig() as one:
        client = await refused(one)
        one.downstreams[1].expire(0)
        assert client.aborted


async def test_with_tls_there_is_no_half_close() -> None:
    async with rig() as one:
        client = await refused(one, tls=True)
        assert not client.ended
        assert not client.is_closing()
        assert one.downstreams[1].deadline <= one.worker.clock() + TIMEOUTS.linger


async def test_a_tls_client_that_ends_is_gone() -> None:
    async with rig() as one:
        client = one.accept(tls=True)
        client.receive(GET % b"1")
        upstream = await one.connect()
        assert one.downstreams[1].eof_received() is False
        client.close()
        await one.turn()
        assert upstream.aborted


# Cutting.


async def test_a_cut_connection_is_reset_not_ended() -> None:
    async with rig() as one:
        one.downstream.cut()
        ((_, _, value),) = one.client.sock.options
        assert value == struct.pack("ii", 1, 0)
        assert one.client.aborted
        one.downstream.cut()
        assert len(one.client.sock.options) == 1


async def test_a_connection_without_a_socket_is_cut_too() -> None:
    async with rig() as one:
        one.client.extra.clear()
        one.downstream.cut()
        assert one.client.aborted


async def test_a_socket_that_is_gone_already_can_be_cut() -> None:
    class Gone:
        def setsockopt(self, *_: object) -> None:
            raise OSError(9, "Bad file descriptor")

    async with rig() as one:
        one.client.extra["socket"] = Gone()
        one.downstream.cut()
        assert one.client.aborted


# Draining.


async def test_an_idle_connection_is_closed_when_draining_begins() -> None:
    async with rig() as one:
        await asyncio.wait_for(one.service.drain(), 5)
        assert (one.client.lost, one.client.aborted) == (True, False)


async def test_an_exchange_is_finished_before_its_connection_is_drained() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        draining = asyncio.create_task(one.service.drain())
        await one.turn()
        assert not one.client.is_closing()
        upstream.receive(OK)
        assert b"\r\nConnection: close\r\n" in one.client.take()
        await asyncio.wait_for(draining, 5)
        assert one.client.lost


async def test_a_response_that_has_begun_is_finished_too() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(OK[:-1])
        draining = asyncio.create_task(one.service.drain())
        await one.turn()
        upstream.receive(OK[-1:])
        await asyncio.wait_for(draining, 5)
        assert one.client.take() == OK


async def test_a_head_that_has_begun_is_served() -> None:
    async with rig() as one:
        one.client.receive((GET % b"1")[:7])
        draining = asyncio.create_task(one.service.drain())
        await one.turn()
        assert not one.client.is_closing()
        one.client.receive((GET % b"1")[7:])
        (await one.connect()).receive(OK)
        await asyncio.wait_for(draining, 5)
        assert b"\r\nConnection: close\r\n" in one.client.take()


async def test_a_refused_connection_is_not_closed_before_it_was_read() -> None:
    async with rig() as one:
        client = await refused(one)
        draining = asyncio.create_task(one.service.drain())
        await one.turn()
        assert not client.is_closing()
        client.receive_eof()
        await asyncio.wait_for(draining, 5)


async def test_a_connection_made_while_draining_does_not_hold_it_up_for_long() -> None:
    """A TLS handshake under way is finished, and its request served if it comes soon."""
    async with rig() as one:
        one.service.draining = True
        one.accept()
        assert one.downstreams[1].deadline <= one.worker.clock() + TIMEOUTS.head


@pytest.mark.parametrize("may", [True, False])
async def test_the_handler_may_want_no_further_request(may: bool) -> None:
    async with rig() as one:
        one.handler.persist = may
        await one.exchange(GET % b"1", OK)
        assert (b"Connection: close" in one.client.take()) is not may
        assert one.client.lost is not may


# Flow.


async def test_requests_answered_by_ourselves_wait_for_a_client_that_reads_nothing() -> None:
    async with rig() as one:
        one.handler.decide = lambda _: Answer(200, b"x" * 10_000, "text/plain")
        one.client.stall()
        for _ in range(20):
            one.client.receive((GET % b"1") * 500)
            await one.turn()
        assert len(one.client.sent) < 256 * 1024
        assert one.client.waiting > 0
        one.client.flow()
        for _ in range(10_000 * 2):
            await asyncio.sleep(0)
        assert one.client.take().count(b"HTTP/1.1 200") == 10_000
        assert one.client.reading


async def test_a_single_request_behind_a_full_answer_waits_too() -> None:
    async with rig() as one:
        one.handler.decide = lambda _: Answer(200, b"x" * 150_000, "text/plain")
        one.client.receive(GET % b"1" + GET % b"2")
        one.client.stall()
        await one.turn()
        assert not one.client.reading
        one.client.receive(GET % b"3")
        await one.turn()
        assert one.client.waiting == len(GET % b"3")


async def test_after_a_lost_connection_nothing_is_written_or_read() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        await one.turn()
        one.client.break_off()
        for act in (one.downstream.pause_reading, one.downstream.resume_reading):
            act()
        one.downstream.write(b"x")
        assert one.client.take() == b""


async def test_a_next_request_is_not_begun_on_a_connection_that_closes() -> None:
    async with rig() as one:
        one.handler.decide = echo
        one.client.receive(GET % b"1" + GET % b"2")
        one.client.break_off()
        await one.turn()
        assert bodies(one.client.take()) == [b"GET /1"]


async def test_a_tunnels_client_that_ends_is_gone() -> None:
    async with rig() as one:
        one.client.receive(UPGRADE)
        upstream = await one.connect()
        upstream.receive(SWITCH)
        one.client.receive_eof()
        await one.turn()
        assert one.client.lost
        assert upstream.lost


async def test_errors_of_the_wire_are_the_meshs_own() -> None:
    def fail(_: RequestLine) -> Answer:
        raise TooMuchError("no")

    class TooMuchError(MeshError):
        code, status, title = "overloaded", 503, "x"

    async with rig() as one:
        one.handler.decide = fail
        one.client.receive(GET % b"1")
        assert problem(one.client.take()) == (503, "overloaded")
        assert not one.client.is_closing()


async def test_a_client_that_takes_its_answer_slowly_is_not_hurried_by_draining() -> None:
    async with rig() as one:
        one.handler.decide = lambda _: Answer(200, b"x" * 200_000, "text/plain")
        one.client.stall()
        one.client.receive(GET % b"1")
        one.downstream.drain()
        assert one.client.is_closing()
        assert one.downstream.deadline > one.worker.clock() + TIMEOUTS.linger


async def test_a_client_that_stalls_while_connecting_pauses_nobody() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        await one.turn()
        one.downstream.pause_writing()
        one.downstream.resume_writing()
        upstream = await one.connect()
        assert upstream.reading


# With real sockets: what the fakes assume of the event loop.


@contextlib.asynccontextmanager
async def served(one: Rig) -> AsyncIterator[socket.socket]:
    """Serve `one` on a real listener; give a client's socket."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: one.service.protocol(one.handler), "127.0.0.1", 0)
    async with server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        with sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, server.sockets[0].getsockname())
            yield sock


async def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), 10):
        data += piece
    return data


async def test_a_real_client_that_never_takes_its_last_answer_is_cut() -> None:
    async with rig(Timeouts(idle=0.2)) as one, served(one) as sock:
        one.handler.decide = lambda _: Answer(200, b"x" * 10_000_000, "text/plain")
        request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(sock, request)
        await eventually(lambda: len(one.records) == 1)
        await eventually(lambda: not one.service.connections)


async def test_a_real_client_reads_its_refusal_although_it_sends_on() -> None:
    async with rig() as one, served(one) as sock:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(
            sock, b"POST / HTTP/1.1\r\nHost : a\r\nContent-Length: 1000000\r\n\r\n"
        )
        await loop.sock_sendall(sock, b"x" * 1_000_000)
        answer = await read_all(sock)
        assert problem(answer) == (400, "bad_request")


async def test_a_cut_is_a_reset_for_a_real_client() -> None:
    async with rig() as one, served(one) as sock:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, GET % b"1")
        await eventually(lambda: bool(one.connector.asked))
        upstream = await one.connect()
        upstream.receive(OK[:-1])
        assert await loop.sock_recv(sock, 65536) == OK[:-1]
        upstream.break_off()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(loop.sock_recv(sock, 65536), 10)


# Giving way.


async def test_only_who_waits_for_a_request_may_give_way() -> None:
    async with rig() as one:
        begun = one.worker.clock()
        assert 0 <= one.client.protocol.waiting_since() - begun + 1 < 2  # type: ignore[attr-defined]
        held = one.client.protocol

        def waits() -> bool:
            return held.waiting_since() is not NEVER  # type: ignore[attr-defined,no-any-return]

        one.client.receive(b"GET /1 HTT")
        assert not waits(), "a head has begun"
        one.client.receive(b"P/1.1\r\nHost: a\r\n\r\n")
        upstream = await one.connect()
        assert not waits(), "an exchange is going on"
        one.client.stall()
        upstream.receive(OK)
        await one.turn()
        assert not waits(), "the client has not taken all of its answer"
        one.client.flow()
        assert waits()
        one.client.close()
        assert not waits(), "it is ending"


async def test_who_is_refused_does_not_give_way() -> None:
    async with rig() as one:
        one.client.receive(b"nonsense\r\n\r\n")
        assert one.client.protocol.waiting_since() is NEVER  # type: ignore[attr-defined]

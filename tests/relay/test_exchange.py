from __future__ import annotations

import pytest
from tests.relay.fakes import FakeTransport, Rig, rig
from tests.relay.messages import (
    CHUNKED,
    GET,
    MEBIBYTE,
    OK,
    POST,
    SWITCH,
    UPGRADE,
    UPGRADE_ON,
    problem,
)

from dstack_mesh.errors import ConnectFailed
from dstack_mesh.model import AppId, PeerIdentity
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import NEVER

# The way up.


async def test_a_request_and_its_response() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        assert upstream.take() == GET % b"1"
        assert upstream.writes == 1
        upstream.receive(OK)
        assert (one.client.take(), one.client.writes) == (OK, 1)
        (record,) = one.records
        assert (record.status, record.code, record.bytes_down) == (200, "", len(OK))
        assert not one.client.is_closing()
        assert [u.transport for u in one.lane.idle] == [upstream]


async def test_nothing_is_sent_before_the_connection_is_ready() -> None:
    async with rig() as one:
        one.client.receive(POST % 5 + b"hello")
        await one.turn()
        assert one.connector.opened == []
        upstream = await one.connect()
        assert (upstream.take(), upstream.writes) == (POST % 5 + b"hello", 1)


async def test_the_peer_is_on_record() -> None:
    async with rig() as one:
        one.connector.peer = PeerIdentity(AppId("a" * 40), NEVER)
        await one.exchange(GET % b"1", OK)
        assert one.records[0].peer is one.connector.peer


@pytest.mark.parametrize("pieces", [1, 7, 1000])
async def test_a_body_streams_as_it_comes(pieces: int) -> None:
    body = bytes(range(250)) * 4
    async with rig() as one:
        one.client.receive(POST % len(body))
        upstream = await one.connect()
        assert upstream.take() == POST % len(body)
        step = len(body) // pieces
        for at in range(0, len(body), step):
            one.client.receive(body[at : at + step])
            assert upstream.take() == body[at : at + step]
        upstream.receive(OK)
        assert one.client.take() == OK
        assert one.records[0].bytes_up == len(body)


async def test_a_chunked_body_is_sent_on_in_chunks() -> None:
    async with rig() as one:
        one.client.receive(CHUNKED + b"3\r\nab")
        upstream = await one.connect()
        assert upstream.take() == CHUNKED + b"2\r\nab\r\n"
        one.client.receive(b"c\r\n0\r\nX-Own: 1\r\nA: b\r\n\r\n")
        assert upstream.take() == b"1\r\nc\r\n0\r\nA: b\r\n\r\n"


async def test_a_client_that_sends_while_connecting_waits_after_one_read() -> None:
    async with rig() as one:
        one.client.receive(POST % (len(MEBIBYTE) + 1) + b"y")
        await one.turn()
        assert one.client.reading
        one.client.receive(MEBIBYTE)
        assert not one.client.reading
        assert one.client.waiting > len(MEBIBYTE) // 2
        upstream = await one.connect()
        assert one.client.reading
        assert upstream.take() == POST % (len(MEBIBYTE) + 1) + b"y" + MEBIBYTE
        upstream.receive(OK)
        assert one.client.take() == OK


async def test_a_client_that_paused_for_a_slow_upstream_goes_on_when_it_takes_more() -> None:
    async with rig() as one:
        one.client.receive(POST % len(MEBIBYTE))
        upstream = await one.connect()
        upstream.stall()
        one.client.receive(MEBIBYTE)
        assert not one.client.reading
        assert len(upstream.sent) < 512 * 1024
        upstream.flow()
        await one.turn()
        assert one.client.reading
        assert upstream.take() == POST % len(MEBIBYTE) + MEBIBYTE


async def test_what_came_while_connecting_may_fill_the_upstream_at_once() -> None:
    async with rig() as one:
        one.connector.stalled = True
        one.client.receive(POST % len(MEBIBYTE))
        await one.turn()
        one.client.receive(MEBIBYTE)
        upstream = await one.connect()
        assert not one.client.reading
        assert len(upstream.sent) < 512 * 1024
        upstream.flow()
        await one.turn()
        assert upstream.take() == POST % len(MEBIBYTE) + MEBIBYTE


async def test_a_malformed_body_ends_both_sides() -> None:
    async with rig() as one:
        one.client.receive(CHUNKED)
        upstream = await one.connect()
        one.client.receive(b"nonsense\r\n")
        assert upstream.aborted
        assert problem(one.client.take()) == (400, "bad_request")
        assert one.client.ended
        assert one.records[0].code == "bad_request"


async def test_a_malformed_body_that_came_with_its_head() -> None:
    async with rig() as one:
        one.client.receive(CHUNKED + b"nonsense\r\n")
        upstream = await one.connect()
        assert upstream.aborted
        assert upstream.take() == b""
        assert problem(one.client.take()) == (400, "bad_request")


# Connecting.


async def test_a_failure_to_connect_is_answered_and_the_client_stays() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        await one.connect(ConnectFailed("no route"))
        assert problem(one.client.take()) == (502, "connect_failed")
        assert (one.client.reading, one.client.is_closing()) == (True, False)
        await one.exchange(GET % b"2", OK)
        assert one.client.take() == OK
        assert [record.code for record in one.records] == ["connect_failed", ""]


async def test_a_failure_to_connect_with_a_body_under_way_closes_the_client() -> None:
    async with rig() as one:
        one.client.receive(POST % len(MEBIBYTE))
        await one.turn()
        one.client.receive(MEBIBYTE[:1000])
        assert not one.client.reading
        await one.connect(ConnectFailed("no route"))
        answer = one.client.take()
        assert problem(answer) == (502, "connect_failed")
        assert b"\r\nConnection: close\r\n" in answer
        assert one.client.ended
        one.client.receive(MEBIBYTE)
        assert (one.client.reading, one.client.waiting) == (True, 0)


async def test_a_fault_of_our_own_is_answered_too(caplog: pytest.LogCaptureFixture) -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        await one.connect(ZeroDivisionError("ours"))
        assert problem(one.client.take()) == (502, "connect_failed")
        assert [record.message for record in caplog.records] == ["connect_fault"]


async def test_a_client_lost_while_connecting_leaves_its_connection_to_the_pool() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        await one.turn()
        one.client.break_off()
        assert one.records[0].status == 0
        upstream = await one.connect()
        assert upstream.take() == b""
        assert [u.transport for u in one.lane.idle] == [upstream]


@pytest.mark.parametrize("error", [ConnectFailed("no route"), ZeroDivisionError("ours")])
async def test_a_client_lost_before_connecting_fails(error: Exception) -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        await one.turn()
        one.client.break_off()
        await one.connect(error)
        assert (one.client.take(), len(one.records)) == (b"", 1)


async def test_a_connection_that_died_before_it_could_be_used_is_told_at_once() -> None:
    async with rig() as one:
        one.connector.die_at_once = True
        one.client.receive(GET % b"1")
        await one.connect()
        assert problem(one.client.take()) == (502, "upstream_closed")
        assert one.worker.upstreams == set()


# The way down.


@pytest.mark.parametrize("minor", [b"0", b"1"])
async def test_a_response_streams_as_it_comes(minor: bytes) -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(b"HTTP/1." + minor + b" 200 OK\r\nContent-Length: 9\r\n\r\n")
        assert one.client.take() == b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
        for piece in (b"abc", b"def", b"ghi"):
            assert one.records == []
            upstream.receive(piece)
            assert one.client.take() == piece
        assert one.records[0].status == 200


async def test_an_upstream_waits_for_a_slow_client_and_then_goes_on() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        one.client.stall()
        upstream.receive(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(MEBIBYTE))
        upstream.receive(MEBIBYTE)
        assert not upstream.reading
        assert len(one.client.sent) < 512 * 1024
        one.client.flow()
        await one.turn()
        assert one.client.take().endswith(MEBIBYTE)
        assert upstream.reading
        assert one.records[0].status == 200


async def test_an_upstream_paused_at_the_responses_end_is_pooled_ready_to_read() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        one.client.stall()
        body = MEBIBYTE[: 200 * 1024]
        upstream.receive(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await one.turn()
        assert [u.transport for u in one.lane.idle] == [upstream]
        assert upstream.reading
        # The client's next request waits until it has taken the response.
        assert not one.client.reading
        one.client.receive(GET % b"2")
        await one.turn()
        assert one.client.waiting > 0
        one.client.flow()
        await one.turn()
        assert upstream.take() == (GET % b"1") + (GET % b"2")
        upstream.receive(OK)
        assert one.client.take().endswith(body + OK)


async def test_an_upstream_that_is_slow_to_take_a_body_is_pooled_all_the_same() -> None:
    async with rig() as one:
        body = MEBIBYTE[: 200 * 1024]
        one.client.receive(POST % len(body))
        upstream = await one.connect()
        upstream.stall()
        one.client.receive(body)
        assert not one.client.reading
        upstream.receive(OK)
        await one.turn()
        assert one.client.reading
        assert [u.transport for u in one.lane.idle] == [upstream]
        upstream.take()
        # The next one's body waits until there is room for it again.
        one.client.receive(POST % 5)
        await one.turn()
        one.client.receive(b"he")
        upstream.flow()
        await one.turn()
        one.client.receive(b"llo")
        assert upstream.take() == POST % 5 + b"hello"
        upstream.receive(OK)
        assert one.client.take() == OK + OK


async def test_interim_responses_go_on_and_the_wait_begins_anew() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        assert one.downstream.deadline < NEVER
        interim = b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
        upstream.receive(interim)
        assert one.client.take() == interim
        assert one.downstream.deadline < NEVER
        upstream.receive(OK)
        assert one.client.take() == OK


async def test_a_response_before_the_requests_end_closes_both() -> None:
    async with rig() as one:
        one.client.receive(POST % 10 + b"abc")
        upstream = await one.connect()
        upstream.receive(b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
        sent = one.client.take()
        assert sent == b"HTTP/1.1 413 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        assert upstream.aborted
        # The rest is read and dropped, so that no reset destroys the answer.
        assert (one.client.ended, one.client.is_closing()) == (True, False)
        one.client.receive(b"defghij")
        one.client.receive_eof()
        assert one.client.is_closing()
        assert one.records[0].status == 413


async def test_a_response_that_begins_before_the_requests_end_and_ends_after_it() -> None:
    async with rig() as one:
        one.client.receive(POST % 6 + b"abc")
        upstream = await one.connect()
        upstream.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc")
        one.client.receive(b"def")
        assert upstream.take().endswith(b"abcdef")
        assert one.downstream.deadline == NEVER
        upstream.receive(b"def")
        assert one.client.take().endswith(b"\r\nConnection: close\r\n\r\nabcdef")
        await one.turn()
        assert one.client.lost
        assert [u.transport for u in one.lane.idle] == [upstream]


async def test_excess_bytes_end_the_upstream() -> None:
    async with rig() as one:
        upstream = await one.exchange(GET % b"1", OK + b"HTTP/1.1 200 OK\r\n")
        assert one.client.take() == OK
        assert upstream.aborted
        assert one.lane.idle == []
        assert not one.client.is_closing()


async def test_bytes_on_an_idle_connection_end_it() -> None:
    async with rig() as one:
        upstream = await one.exchange(GET % b"1", OK)
        upstream.receive(OK)
        assert upstream.aborted
        await one.turn()
        assert one.lane.idle == []


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"HTTP/1.1 102 P\r\n\r\n" * 17,
    ],
)
async def test_an_invalid_response_is_an_error_of_the_upstream(response: bytes) -> None:
    async with rig() as one:
        upstream = await one.exchange(GET % b"1", response)
        assert problem(one.client.take()) == (502, "upstream_protocol_error")
        assert upstream.aborted
        assert not one.client.is_closing()
        assert [(r.status, r.code) for r in one.records] == [(502, "upstream_protocol_error")]


async def test_a_response_that_turns_invalid_is_cut() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        upstream.receive(b"nonsense\r\n")
        assert one.client.take().endswith(b"1\r\na\r\n")
        assert (upstream.aborted, one.client.aborted) == (True, True)
        assert len(one.client.sock.options) == 1
        assert [(r.status, r.code) for r in one.records] == [(200, "upstream_protocol_error")]


# The upstream's end.


@pytest.mark.parametrize("orderly", [True, False])
async def test_an_upstream_lost_before_a_response(orderly: bool) -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        if orderly:
            upstream.receive_eof()
        else:
            upstream.break_off()
        await one.turn()
        assert problem(one.client.take()) == (502, "upstream_closed")
        assert not one.client.is_closing()


async def test_an_upstream_lost_while_the_body_streams() -> None:
    async with rig() as one:
        one.client.receive(POST % len(MEBIBYTE))
        upstream = await one.connect()
        upstream.stall()
        one.client.receive(MEBIBYTE)
        assert not one.client.reading
        upstream.break_off()
        assert problem(one.client.take()) == (502, "upstream_closed")
        await one.turn()
        assert (one.client.ended, one.client.reading, one.client.waiting) == (True, True, 0)


@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n",
    ],
)
@pytest.mark.parametrize("orderly", [True, False])
async def test_a_response_that_breaks_off_is_cut(begun: bytes, orderly: bool) -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(begun)
        assert b"0\r\n\r\n" not in one.client.take()
        if orderly:
            upstream.receive_eof()
        else:
            upstream.break_off()
        await one.turn()
        assert (one.client.take(), one.client.aborted) == (b"", True)
        assert [(r.status, r.code) for r in one.records] == [(200, "upstream_closed")]


async def test_a_response_that_ends_with_its_connection() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(b"HTTP/1.1 200 OK\r\n\r\nab")
        upstream.receive_eof()
        await one.turn()
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert one.client.take() == head + b"2\r\nab\r\n0\r\n\r\n"
        assert not one.client.is_closing()
        await one.exchange(GET % b"2", OK)
        assert one.client.take() == OK


async def test_a_response_that_ends_with_its_connection_out_of_order_is_cut() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(b"HTTP/1.1 200 OK\r\n\r\nab")
        upstream.break_off()
        assert one.client.aborted
        assert not one.client.take().endswith(b"0\r\n\r\n")


async def test_a_response_that_ends_with_its_connection_before_the_request_does() -> None:
    async with rig() as one:
        one.client.receive(POST % 9 + b"abc")
        upstream = await one.connect()
        upstream.receive(b"HTTP/1.0 200 OK\r\n\r\nab")
        upstream.receive_eof()
        await one.turn()
        assert one.client.take().endswith(b"Connection: close\r\n\r\n2\r\nab\r\n0\r\n\r\n")
        assert (one.client.ended, one.client.is_closing()) == (True, False)


# Once more, on a fresh connection.


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"])
@pytest.mark.parametrize("orderly", [True, False])
async def test_a_pooled_connection_that_died_is_made_up_for(method: bytes, orderly: bool) -> None:
    async with rig() as one:
        first = await one.exchange(GET % b"1", OK)
        first.take()
        one.client.take()
        request = method + b" /2 HTTP/1.1\r\nHost: a\r\n\r\n"
        one.client.receive(request)
        assert first.take() == request
        if orderly:
            first.receive_eof()
        else:
            first.break_off()
        second = await one.connect()
        assert second is not first
        assert second.take() == request
        second.receive(b"HTTP/1.1 204 No\r\n\r\n")
        assert one.client.take() == b"HTTP/1.1 204 No\r\n\r\n"
        assert [record.status for record in one.records] == [200, 204]


async def test_it_is_made_up_for_only_once() -> None:
    async with rig() as one:
        first = await one.exchange(GET % b"1", OK)
        one.client.take()
        one.client.receive(GET % b"2")
        first.break_off()
        second = await one.connect()
        second.break_off()
        assert problem(one.client.take()) == (502, "upstream_closed")
        await one.turn()
        assert one.connector.asked == []


async def test_the_second_attempt_never_takes_a_pooled_connection() -> None:
    async with rig() as one:
        other = one.accept()
        one.client.receive(GET % b"1")
        other.receive(GET % b"2")
        first, second = await one.connect(), await one.connect()
        first.receive(OK)
        second.receive(OK)
        await one.turn()
        assert len(one.lane.idle) == 2
        one.client.receive(GET % b"3")
        second.break_off()
        await one.turn()
        assert len(one.connector.asked) == 1
        assert first.take() == GET % b"1"


@pytest.mark.parametrize(
    ("why", "request_"),
    [
        ("not idempotent", b"POST / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("an unknown method", b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("in another case", b"get / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("a body that is sent", b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx"),
        ("a body under way", b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nx"),
    ],
)
async def test_what_must_not_be_sent_twice_is_not(why: str, request_: bytes) -> None:
    async with rig() as one:
        first = await one.exchange(GET % b"1", OK)
        one.client.take()
        one.client.receive(request_)
        first.break_off()
        assert problem(one.client.take()) == (502, "upstream_closed")
        await one.turn()
        assert one.connector.asked == []


@pytest.mark.parametrize("begun", [b"H", b"HTTP/1.1 103 E\r\n\r\n"])
async def test_nothing_is_sent_twice_once_an_answer_has_begun(begun: bytes) -> None:
    async with rig() as one:
        first = await one.exchange(GET % b"1", OK)
        one.client.take()
        one.client.receive(GET % b"2")
        first.receive(begun)
        first.break_off()
        assert problem(one.client.take().removeprefix(b"HTTP/1.1 103 E\r\n\r\n"))[0] == 502
        await one.turn()
        assert one.connector.asked == []


async def test_a_fresh_connection_that_dies_is_not_made_up_for() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        (await one.connect()).break_off()
        await one.turn()
        assert problem(one.client.take()) == (502, "upstream_closed")
        assert one.connector.asked == []


async def test_a_client_lost_during_the_second_attempt() -> None:
    async with rig() as one:
        first = await one.exchange(GET % b"1", OK)
        one.client.receive(GET % b"2")
        first.break_off()
        await one.turn()
        one.client.break_off()
        second = await one.connect()
        assert second.take() == b""
        assert len(one.records) == 2


# Pipelining.


@pytest.mark.parametrize("cut", range(0, len(GET % b"2") + 1, 3))
@pytest.mark.parametrize("connected", [False, True])
async def test_a_request_that_comes_in_two_pieces_behind_another(cut: int, connected: bool) -> None:
    first, second = GET % b"1", GET % b"2"
    async with rig() as one:
        one.client.receive(first + second[:cut])
        upstream = await one.connect() if connected else None
        await one.turn()
        one.client.receive(second[cut:])
        upstream = upstream or await one.connect()
        upstream.receive(OK)
        await one.turn()
        assert upstream.take() == first + second
        upstream.receive(OK)
        assert one.client.take() == OK + OK
        assert one.client.reading


async def test_many_requests_in_one_read() -> None:
    async with rig() as one:
        one.client.receive(b"".join(GET % b"%d" % number for number in range(50)))
        upstream = await one.connect()
        for number in range(50):
            assert upstream.take() == GET % b"%d" % number
            upstream.receive(OK)
            await one.turn()
        assert one.client.take() == OK * 50
        assert len(one.connector.opened) == 1


async def test_a_body_and_the_next_request_in_one_read() -> None:
    async with rig() as one:
        one.client.receive(POST % 3 + b"abc" + CHUNKED + b"1\r\na\r\n0\r\n\r\n" + GET % b"3")
        upstream = await one.connect()
        assert upstream.take() == POST % 3 + b"abc"
        upstream.receive(OK)
        await one.turn()
        assert upstream.take() == CHUNKED + b"1\r\na\r\n0\r\n\r\n"
        upstream.receive(OK)
        await one.turn()
        assert upstream.take() == GET % b"3"


async def test_the_beginning_of_a_body_behind_another_request() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1" + POST % 6 + b"abc")
        upstream = await one.connect()
        upstream.receive(OK)
        await one.turn()
        assert one.client.reading
        one.client.receive(b"def")
        assert upstream.take() == GET % b"1" + POST % 6 + b"abcdef"


async def test_a_client_that_pipelines_without_end_waits_in_its_socket() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        for _ in range(100):
            one.client.receive((GET % b"2") * 100)
        held = 100 * 100 * len(GET % b"2") - one.client.waiting
        assert held <= 256 * 1024
        upstream.receive(OK)
        await one.turn()
        assert upstream.take() == GET % b"1" + GET % b"2"


async def test_requests_behind_an_answer_of_our_own() -> None:
    async with rig() as one:
        one.handler.decide = lambda line: Answer(200, line.target, "text/plain")
        one.client.receive(b"".join(GET % b"%d" % number for number in range(5)))
        await one.turn()
        bodies = [part.rpartition(b"\r\n\r\n")[2] for part in one.client.take().split(b"HTTP/1.1")]
        assert b"".join(bodies) == b"/0/1/2/3/4"


async def test_a_request_behind_one_that_failed_to_connect() -> None:
    async with rig() as one:
        one.client.receive((GET % b"1") + (GET % b"2"))
        await one.connect(ConnectFailed("no route"))
        assert problem(one.client.take()) == (502, "connect_failed")
        upstream = await one.connect()
        assert upstream.take() == GET % b"2"


async def test_requests_behind_the_last_one_are_not_served() -> None:
    last = b"GET /1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    async with rig() as one:
        one.client.receive(last + GET % b"2")
        upstream = await one.connect()
        assert upstream.take() == GET % b"1"
        upstream.receive(OK)
        await one.turn()
        assert (upstream.take(), one.client.lost) == (b"", True)


# A changed protocol.


async def switched(one: Rig, behind: bytes = b"") -> FakeTransport:
    one.client.receive(UPGRADE)
    upstream = await one.connect()
    assert upstream.take() == UPGRADE_ON
    upstream.receive(SWITCH + behind)
    assert one.client.take() == SWITCH + behind
    return upstream


async def test_after_a_101_bytes_go_both_ways_as_they_are() -> None:
    async with rig() as one:
        upstream = await switched(one, b"\x81\x01x")
        one.client.receive(b"GET / HTTP/1.1\r\n\r\n\0\xff")
        assert upstream.take() == b"GET / HTTP/1.1\r\n\r\n\0\xff"
        upstream.receive(b"\0HTTP/1.1 200 OK\r\n\r\n")
        assert one.client.take() == b"\0HTTP/1.1 200 OK\r\n\r\n"
        assert one.downstream.deadline == NEVER


async def test_what_the_client_sent_ahead_belongs_to_the_new_protocol() -> None:
    async with rig() as one:
        one.client.receive(UPGRADE + b"early")
        upstream = await one.connect()
        assert upstream.take() == UPGRADE_ON
        upstream.receive(SWITCH)
        assert upstream.take() == b"early"
        await one.turn()
        one.client.receive(b"late")
        assert upstream.take() == b"late"
        assert one.downstream._exchange is not None
        assert one.downstream._exchange.bytes_up == 9


async def test_a_refused_upgrade_is_a_response_like_any_other() -> None:
    async with rig() as one:
        await one.exchange(UPGRADE, OK)
        assert one.client.take() == OK
        await one.exchange(GET % b"2", OK)
        assert one.client.take() == OK


@pytest.mark.parametrize("side", ["client", "upstream"])
async def test_whoever_is_slow_pauses_the_other(side: str) -> None:
    async with rig() as one:
        upstream = await switched(one)
        slow, quick = (one.client, upstream) if side == "client" else (upstream, one.client)
        slow.stall()
        quick.receive(MEBIBYTE)
        assert not quick.reading
        assert len(slow.sent) < 512 * 1024
        slow.flow()
        await one.turn()
        assert (slow.take(), quick.reading) == (MEBIBYTE, True)


async def test_an_upstream_that_is_full_at_the_101_gets_no_more() -> None:
    request = POST.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
    async with rig() as one:
        body = MEBIBYTE[: 200 * 1024]
        one.client.receive(request % len(body))
        upstream = await one.connect()
        upstream.stall()
        one.client.receive(body)
        assert not one.client.reading
        upstream.receive(SWITCH)
        await one.turn()
        assert not one.client.reading
        upstream.flow()
        assert one.client.reading


@pytest.mark.parametrize("orderly", [True, False])
async def test_a_tunnel_ends_with_its_client_but_not_before_what_it_sent(orderly: bool) -> None:
    async with rig() as one:
        upstream = await switched(one)
        upstream.stall()
        one.client.receive(b"last words")
        if orderly:
            one.client.receive_eof()
        else:
            one.client.break_off()
        await one.turn()
        assert upstream.lost
        assert not upstream.aborted
        assert one.records[0].status == 101


async def test_a_tunnel_ends_with_its_upstream_but_not_before_what_it_sent() -> None:
    async with rig() as one:
        upstream = await switched(one)
        upstream.receive(b"last words")
        upstream.receive_eof()
        await one.turn()
        assert one.client.take() == b"last words"
        assert (one.client.lost, one.client.aborted) == (True, False)


@pytest.mark.parametrize("head", [POST % 10, CHUNKED])
async def test_a_101_before_the_requests_end_is_refused_rfc9110_7_8(head: bytes) -> None:
    """What then comes from the client would be a body to one side, a new protocol to the other."""
    head = head.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
    async with rig() as one:
        one.client.receive(head)
        upstream = await one.connect()
        upstream.receive(SWITCH)
        assert problem(one.client.take()) == (502, "upstream_protocol_error")
        assert upstream.aborted

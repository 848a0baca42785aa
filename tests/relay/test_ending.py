from __future__ import annotations

import asyncio
import json

import pytest
from tests.relay.fakes import TIMEOUTS, rig
from tests.relay.messages import (
    GET,
    MEBIBYTE,
    OK,
    POST,
    problem,
)

from dstack_mesh.errors import IdentityUnavailable
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.wire.request_line import RequestLine

# The client's end.


@pytest.mark.parametrize(
    "request_",
    [GET % b"1", POST % 10 + b"abc"],
    ids=["waiting for the response", "body under way"],
)
async def test_a_client_lost_takes_the_upstream_with_it(request_: bytes) -> None:
    async with rig() as one:
        one.client.receive(request_)
        upstream = await one.connect()
        one.client.break_off()
        assert upstream.aborted
        assert (one.records[0].status, len(one.records)) == (0, 1)
        await one.turn()
        assert one.lane.idle == []


async def test_a_client_lost_during_the_response() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(OK[:-1])
        one.client.break_off()
        assert upstream.aborted
        assert (one.records[0].status, one.records[0].code) == (200, "")


async def test_a_client_that_ends_within_its_body_is_lost() -> None:
    async with rig() as one:
        one.client.receive(POST % 10 + b"abc")
        upstream = await one.connect()
        one.client.receive_eof()
        await one.turn()
        assert upstream.aborted


@pytest.mark.parametrize("when", ["connecting", "waiting", "during the response"])
async def test_a_client_that_has_finished_sending_gets_its_response(when: str) -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        if when == "connecting":
            await one.turn()
            one.client.receive_eof()
        upstream = await one.connect()
        if when == "waiting":
            one.client.receive_eof()
        upstream.receive(OK[:-1])
        if when == "during the response":
            one.client.receive_eof()
        upstream.receive(OK[-1:])
        assert one.client.take().endswith(b"\r\n\r\nok")
        await one.turn()
        assert one.client.lost
        assert not one.client.aborted


# Time.


async def test_the_wait_for_a_response_begins_with_the_requests_end() -> None:
    async with rig() as one:
        one.client.receive(POST % 2 + b"a")
        assert 0 < one.downstream.deadline - one.worker.clock() <= TIMEOUTS.wait
        await one.connect()
        assert one.downstream.deadline == NEVER
        one.client.receive(b"b")
        now = one.worker.clock()
        assert now < one.downstream.deadline <= now + TIMEOUTS.response


async def test_an_interim_response_before_the_requests_end_starts_no_wait() -> None:
    async with rig() as one:
        one.client.receive(POST % 2)
        upstream = await one.connect()
        upstream.receive(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert one.downstream.deadline == NEVER
        one.client.receive(b"ab")
        assert one.downstream.deadline < NEVER


async def test_a_response_that_has_begun_is_waited_for() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        upstream.receive(OK[:-1])
        assert one.downstream.deadline == NEVER


async def test_a_response_that_does_not_begin_is_a_timeout() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1")
        upstream = await one.connect()
        one.downstream.expire(one.downstream.deadline)
        assert problem(one.client.take()) == (504, "response_timeout")
        assert upstream.aborted
        assert not one.client.is_closing()
        await one.exchange(GET % b"2", OK)
        assert one.client.take() == OK


# Answers of our own.


@pytest.mark.parametrize(
    ("request_", "closes", "body"),
    [
        (GET % b"1", False, b"text"),
        (b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", False, b""),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", True, b"text"),
        (b"GET / HTTP/1.0\r\n\r\n", True, b"text"),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False, b"text"),
        (POST % 5 + b"he", True, b"text"),
    ],
)
async def test_answers(request_: bytes, closes: bool, body: bytes) -> None:
    async with rig() as one:
        one.handler.decide = lambda _: Answer(200, b"text", "text/plain")
        one.client.receive(request_)
        await one.turn()
        head, _, seen = one.client.take().partition(b"\r\n\r\n")
        assert seen == body
        assert b"Content-Length: 4" in head
        assert (b"Connection: close" in head) is closes
        assert (b"Connection: keep-alive" in head) is (b"keep-alive" in request_)
        assert (one.client.ended or one.client.lost) is closes


async def test_a_refusal_names_the_request() -> None:
    def refuse(_: RequestLine) -> Answer:
        raise IdentityUnavailable("not yet")

    async with rig() as one:
        one.handler.decide = refuse
        one.client.receive(GET[:-2] % b"1" + b"X-Request-Id: r-1\r\n\r\n")
        answer = one.client.take()
        assert problem(answer) == (503, "identity_unavailable")
        assert b"\r\nRetry-After: 1\r\n" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"] == "r-1"
        assert not one.client.is_closing()


async def later(ready: asyncio.Event) -> Answer:
    await ready.wait()
    return Answer(200, b"text", "text/plain")


async def test_an_answer_that_takes_its_time() -> None:
    ready = asyncio.Event()

    async with rig() as one:
        one.handler.decide = lambda _: later(ready)
        one.client.receive(GET % b"1")
        one.client.receive(GET % b"2")
        await one.turn()
        assert one.client.take() == b""
        ready.set()
        await one.turn()
        assert one.client.take().count(b"\r\n\r\ntext") == 2


async def test_an_answer_that_takes_its_time_to_a_request_with_a_body() -> None:
    ready = asyncio.Event()

    async with rig() as one:
        one.handler.decide = lambda _: later(ready)
        one.client.receive(POST % len(MEBIBYTE))
        one.client.receive(MEBIBYTE)
        await one.turn()
        assert not one.client.reading
        ready.set()
        await one.turn()
        assert one.client.take().endswith(b"text")
        assert (one.client.ended, one.client.waiting) == (True, 0)


@pytest.mark.parametrize("cut", range(7))
async def test_a_body_before_a_late_answer_is_never_read_as_a_request(cut: int) -> None:
    ready = asyncio.Event()

    async with rig() as one:
        one.handler.decide = lambda line: (
            later(ready) if line.target == b"/" else Answer(200, line.target, "text/plain")
        )
        data = b"abcdef" + GET % b"next"
        one.client.receive(POST % 6 + data[:cut])
        one.client.receive(data[cut:])
        ready.set()
        await one.turn()
        sent = one.client.take()
        assert sent.count(b"HTTP/1.1 200 OK") == sent.count(b"HTTP/1.1 ") == 2
        assert sent.endswith(b"/next")


async def test_an_answer_to_a_client_that_is_gone() -> None:
    ready = asyncio.Event()

    async with rig() as one:
        one.handler.decide = lambda _: later(ready)
        one.client.receive(GET % b"1")
        await one.turn()
        one.client.break_off()
        ready.set()
        await one.turn()
        assert one.client.take() == b""
        assert len(one.records) == 1


async def test_an_answer_that_fails_is_told_and_one_with_a_fault_ends_the_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(error: Exception) -> Answer:
        raise error

    async with rig() as one:
        one.handler.decide = lambda _: fail(IdentityUnavailable("not yet"))
        one.client.receive(GET % b"1")
        await one.turn()
        assert problem(one.client.take()) == (503, "identity_unavailable")
        one.handler.decide = lambda _: fail(ZeroDivisionError("ours"))
        one.client.receive(GET % b"2")
        await one.turn()
        assert one.client.aborted
        assert [record.message for record in caplog.records] == ["answer_fault"]


async def test_each_exchange_is_recorded_once() -> None:
    async with rig() as one:
        await one.exchange(GET % b"1", OK)
        one.client.receive(GET % b"2")
        one.client.break_off()
        one.upstream.break_off()
        await one.turn()
        assert [record.line.target for record in one.records] == [b"/1", b"/2"]
        assert all(isinstance(record, Exchange) and record.ended for record in one.records)

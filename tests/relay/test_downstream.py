from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.relay.fakes import TIMEOUTS, FakePlan, rig
from tests.relay.messages import GET, OK, POST, bodies, echo, pieces, problem

from dstack_mesh.relay import downstream
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.interfaces import Decision
from dstack_mesh.relay.lane import Route
from dstack_mesh.wire.fields import has_bare_lf
from dstack_mesh.wire.limits import MAX_FIELDS, MAX_HEAD_BYTES, MAX_REQUEST_TARGET_BYTES
from dstack_mesh.wire.request_line import RequestLine, parse_request_line

# What comes again.


def block_of(number: int, lines: bytes = b"") -> bytes:
    return b"GET /%d HTTP/1.1\r\nHost: a\r\n%b\r\n" % (number, lines)


async def test_a_head_that_comes_again_is_understood_once_and_routed_each_time() -> None:
    async with rig() as one:
        asked: list[Route | None] = []
        real = one.handler.route

        def route(line: RequestLine, plan: FakePlan, last: Route | None = None) -> Decision:
            asked.append(last)
            return real(line, plan)

        one.handler.decide = None
        one.handler.route = route  # type: ignore[method-assign]
        for _ in range(3):
            upstream = await one.exchange(GET % b"1", OK)
            assert upstream.take() == GET % b"1"
            assert one.client.take() == OK
        assert [line.target for line in one.handler.planned] == [b"/1"]
        assert asked[0] is None
        assert all(last is not None and last.lane is one.lane for last in asked[1:])


async def test_fields_that_come_again_behind_another_target_are_understood_once() -> None:
    async with rig() as one:
        for number in range(3):
            upstream = await one.exchange(block_of(number), OK)
            assert upstream.take() == block_of(number)
        assert [line.target for line in one.handler.planned] == [b"/0"]
        await one.exchange(block_of(3, b"X-A: 1\r\n"), OK)
        assert [line.target for line in one.handler.planned] == [b"/0", b"/3"]


@pytest.mark.parametrize("line", [b"GET /1 HTTP/1.0", b"GET http://b/1 HTTP/1.1"])
async def test_the_first_line_may_change_what_fields_mean(line: bytes) -> None:
    async with rig() as one:
        fields = b"\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"
        for _ in range(2):
            await one.exchange(line + fields, OK)
        await one.exchange(b"GET /1 HTTP/1.1" + fields, OK)
        await one.exchange(line + fields, OK)
        assert len(one.handler.planned) == 4


async def test_a_head_behind_a_part_of_another_is_not_taken_for_the_last_one() -> None:
    async with rig() as one:
        one.handler.decide = echo
        one.client.receive(block_of(1))
        one.client.receive(b"GET /2 HTTP/1.1\r\nHost: a\r\nX-A: ")
        one.client.receive(block_of(1))
        await one.turn()
        assert bodies(one.client.take())[0] == b"GET /1"
        assert len(one.records) == 1, "what has come is no head yet: it ends in a bad line"


async def test_a_body_behind_a_head_that_comes_again() -> None:
    async with rig() as one:
        head = POST % 3
        for body in (b"abc", b"def"):
            one.client.receive(head)
            one.client.receive(body)
            await one.turn()
            upstream = await one.connect() if one.connector.asked else one.upstream
            assert upstream.take() == head + body
            upstream.receive(OK)
            await one.turn()
        one.client.receive(head + b"ghi" + head)
        await one.turn()
        assert one.upstream.take() == head + b"ghi"
        assert len(one.handler.planned) == 1


async def test_long_heads_are_not_held() -> None:
    async with rig() as one:
        for _ in range(2):
            await one.exchange(block_of(1, b"X-A: %b\r\n" % (b"x" * 3000)), OK)
        assert len(one.handler.planned) == 2


# Heads.


async def test_a_head_may_come_byte_by_byte() -> None:
    async with rig() as one:
        for byte in GET % b"1":
            assert one.connector.asked == []
            one.client.receive(bytes([byte]))
            await one.turn()
        upstream = await one.connect()
        assert upstream.take() == GET % b"1"


@pytest.mark.parametrize(
    "lines", [b"\r\n", b"\r\n\r\n\r\n"], ids=["one empty line", "three empty lines"]
)
async def test_empty_lines_before_a_request_are_passed_over_rfc9112_2_2(lines: bytes) -> None:
    data = lines + GET % b"1"
    for at in range(len(lines) + 3):
        async with rig() as one:
            one.client.receive(data[:at])
            one.client.receive(data[at:])
            upstream = await one.connect()
            assert upstream.take() == GET % b"1"


class Counting(bytes):
    """Bytes that count how often they are copied in part."""

    copied = 0

    def __getitem__(self, key: object) -> bytes:  # type: ignore[override]
        found = Counting(super().__getitem__(key))  # type: ignore[index]
        Counting.copied += len(found)
        return found


async def test_empty_lines_without_end_cost_no_more_than_their_length() -> None:
    async with rig() as one:
        Counting.copied = 0
        one.downstream._head_data(Counting(b"\r\n" * 100_000 + GET % b"1"))
        assert Counting.copied < 1000
        await one.turn()
        assert len(one.connector.asked) == 1


async def test_a_head_in_small_pieces_costs_no_more_than_its_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = 0

    def counting(data: bytes, start: int) -> bool:
        nonlocal looked_at
        looked_at += len(data) - start
        return has_bare_lf(data, start)

    parsed: list[bytes] = []

    def parsing(line: bytes) -> RequestLine:
        parsed.append(line)
        return parse_request_line(line)

    monkeypatch.setattr(downstream, "has_bare_lf", counting)
    monkeypatch.setattr(downstream, "parse_request_line", parsing)
    async with rig() as one:
        head = head_of(20_000)
        for byte in head:
            one.client.receive(bytes([byte]))
        await one.turn()
        assert len(one.connector.asked) == 1
    assert looked_at <= len(head)
    assert len(parsed) == 2  # once when the line was there, once with the whole head


async def test_empty_lines_alone_do_not_keep_a_connection() -> None:
    async with rig() as one:
        deadline = one.downstream.deadline
        for _ in range(10):
            one.client.receive(b"\r\n" * 1000)
        assert one.downstream.deadline == deadline < NEVER


REFUSED = [
    ("no HTTP", b"hello\r\n\r\n", "bad_request"),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "bad_request"),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "bad_request"),
    ("HTTP/0.9", b"GET /\r\n", "bad_request"),
    ("bare LF", b"GET / HTTP/1.1\nHost: a\n\n", "bad_request"),
    ("a bare LF in the middle", b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n", "bad_request"),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", "bad_request"),
    ("white space first", b" GET / HTTP/1.1\r\n", "bad_request"),
    ("a bare CR first", b"\rGET / HTTP/1.1\r\n", "bad_request"),
    ("both lengths", POST % 5 + b"", None),
    ("a malformed field", b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", "bad_request"),
    ("a long target", b"GET /" + b"x" * MAX_REQUEST_TARGET_BYTES, None),
    ("a target too long", b"GET /" + b"x" * (MAX_REQUEST_TARGET_BYTES + 2000), "uri_too_long"),
    ("a method too long", b"M" * (MAX_REQUEST_TARGET_BYTES + 2000), "uri_too_long"),
    (
        "a whole line too long",
        b"GET /" + b"x" * MAX_REQUEST_TARGET_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        "uri_too_long",
    ),
    ("a head too large", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 11_000, "header_too_large"),
    (
        "too many fields",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * MAX_FIELDS + b"\r\n",
        "header_too_large",
    ),
]


@pytest.mark.parametrize(
    ("data", "code"), [(d, c) for _, d, c in REFUSED], ids=[name for name, *_ in REFUSED]
)
@pytest.mark.parametrize("size", [1 << 20, 4096, 7])
async def test_what_is_no_request_is_refused_however_it_comes(
    data: bytes, code: str | None, size: int
) -> None:
    async with rig() as one:
        for at in range(0, len(data), size):
            one.client.receive(data[at : at + size])
        await one.turn()
        if code is None:
            assert one.client.take() == b""
            return
        answer = one.client.take()
        assert problem(answer)[1] == code
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.count(b"HTTP/1.1 ") == 1
        assert one.client.ended
        assert one.connector.asked == []


def head_of(size: int) -> bytes:
    start = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nX: "
    return start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"


@pytest.mark.parametrize("where", [[], [100], [-1], [-2], [-3], [-4]])
async def test_the_limit_on_a_head(where: list[int]) -> None:
    # The body has a bare LF in it: it is no part of the head, whatever its size.
    for size in (MAX_HEAD_BYTES, MAX_HEAD_BYTES + 1):
        async with rig() as one:
            head = head_of(size)
            first, *rest = pieces(head, [w % len(head) for w in where])
            one.client.receive(first)
            for piece in rest:
                one.client.receive(piece)
            one.client.receive(b"\n\r\n\r\nx")
            await one.turn()
            if size == MAX_HEAD_BYTES:
                assert len(one.connector.asked) == 1
            else:
                assert problem(one.client.take()) == (431, "header_too_large")


async def test_a_head_over_the_limit_with_its_body_in_one_read() -> None:
    async with rig() as one:
        one.client.receive(head_of(MAX_HEAD_BYTES + 1) + b"\n\n\n\n\n\n")
        assert problem(one.client.take()) == (431, "header_too_large")


async def test_empty_lines_do_not_count_as_head() -> None:
    async with rig() as one:
        one.client.receive(b"\r\n" * 1000 + head_of(MAX_HEAD_BYTES))
        await one.turn()
        assert len(one.connector.asked) == 1


async def test_a_refusal_names_the_request() -> None:
    async with rig() as one:
        one.client.receive(b"GET / HTTP/1.1\r\nX-Request-ID: r-1\r\nHost : a\r\n\r\n")
        answer = one.client.take()
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["request_id"] == "r-1"


STREAM = (
    b"\r\nGET /1 HTTP/1.1\r\nHost: a\r\n\r\n"
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nX-Long: " + b"y" * 50 + b"\r\n\r\n"
    b"\r\n\r\nPUT http://b/3 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
    b"GET /4 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    b"GET /5 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_any_split_of_a_stream_of_requests_gives_the_same(where: list[int]) -> None:
    async def run() -> list[bytes]:
        async with rig() as one:
            one.handler.decide = echo
            for piece in pieces(STREAM, where):
                one.client.receive(piece)
                await one.turn()
            assert one.client.lost
            return bodies(one.client.take())

    wanted = [b"GET /1", b"OPTIONS *", b"PUT /3", b"GET /4", b"GET /5"]
    assert asyncio.run(run()) == wanted


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"GET ", b"/", b" HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n", b"\n", b"\r"])
        | st.binary(max_size=3),
        max_size=14,
    ).map(b"".join),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_any_bytes_are_answered_or_waited_for(data: bytes, where: list[int]) -> None:
    """No bytes make the connection fail in any other way than by an answer."""

    async def run(split: list[bytes]) -> tuple[bool, list[bytes]]:
        async with rig() as one:
            one.handler.decide = echo
            for piece in split:
                if piece:
                    one.client.receive(piece)
                    await one.turn()
            assert not one.client.aborted
            parts = one.client.take().split(b"HTTP/1.1 ")[1:]
            return one.client.ended, [part[:3] for part in parts]

    assert asyncio.run(run(pieces(data, where))) == asyncio.run(run([data]))


async def test_a_handlers_error_in_a_plan_ends_the_connection() -> None:
    async with rig() as one:
        one.client.receive(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n" + GET % b"2")
        await one.turn()
        assert one.client.take().count(b"HTTP/1.1 ") == 1
        assert one.records == []


# Time.


async def test_a_connection_without_a_request_is_closed_when_idle() -> None:
    async with rig() as one:
        now = one.worker.clock()
        assert now < one.downstream.deadline <= now + TIMEOUTS.idle
        one.downstream.expire(one.downstream.deadline)
        await one.turn()
        assert one.client.lost


async def test_a_head_has_its_own_time_from_its_first_byte() -> None:
    async with rig() as one:
        one.client.receive(b"GET / HT")
        deadline = one.downstream.deadline
        now = one.worker.clock()
        assert now < deadline <= now + TIMEOUTS.head
        one.client.receive(b"TP/1.1\r\n")
        assert one.downstream.deadline == deadline
        one.downstream.expire(deadline)
        assert one.client.aborted


async def test_a_whole_head_ends_its_time() -> None:
    async with rig() as one:
        one.client.receive((GET % b"1")[:5])
        one.client.receive((GET % b"1")[5:])
        assert one.downstream.deadline > one.worker.clock() + TIMEOUTS.wait - 1
        upstream = await one.connect()
        upstream.receive(OK)
        assert one.downstream.deadline > one.worker.clock() + TIMEOUTS.head
        one.client.receive(b"G")
        assert one.downstream.deadline <= one.worker.clock() + TIMEOUTS.head


async def test_a_head_behind_another_request_has_its_time_once_it_is_looked_at() -> None:
    async with rig() as one:
        one.client.receive(GET % b"1" + b"GET /2")
        upstream = await one.connect()
        upstream.receive(OK)
        await one.turn()
        assert one.downstream.deadline <= one.worker.clock() + TIMEOUTS.head
        assert one.client.reading


async def test_a_client_that_never_takes_its_last_answer_is_cut() -> None:
    async with rig() as one:
        one.client.stall()
        one.client.receive(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        upstream = await one.connect()
        upstream.receive(OK)
        assert one.client.is_closing()
        assert one.downstream.deadline < NEVER

"""The table of responses in pieces, over transports in memory, and read by another reader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.wire.limits import MAX_INTERIM_RESPONSES
from dstack_mesh.wire.request_line import RequestLine
from dstack_mesh.wire.translate import ResponseRules
from tests.http.corpus import Message
from tests.http.response_rows import BOTH, ROWS, Told, one_row, passed_on, read, told
from tests.relay.fakes import GET_1, OK, REMOVE, FakeTransport, Rig, rig

RULES = {way: ResponseRules(remote_errors=way == "outbound") for way in BOTH}
_HELD_BACK = 600
"""Bytes at the end of a long row that go in pieces; what is before them goes at once."""


@one_row
async def test_a_row_in_pieces(row: Message) -> None:
    what = told(row)
    for way in what.directions:
        for size in (1, 2, 3):
            async with rig() as one:
                one.handler.decide = decide(one, RULES[way])
                one.client.receive(what.head("/", b""))
                upstream = await one.connect()
                send_in_pieces(upstream, row.sent, size)
                await one.turn()
                if what.end == "reset" or (what.end == "fin" and way == "outbound"):
                    upstream.break_off()
                elif what.end:
                    upstream.receive_eof()
                await one.turn()
                check_pieces(one, upstream, row, what)


def decide(one: Rig, rules: ResponseRules) -> Callable[[RequestLine], Route]:
    head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    return lambda line: Route(one.lane, head, rules, REMOVE)


def send_in_pieces(upstream: FakeTransport, data: bytes, size: int) -> None:
    at = max(0, len(data) - _HELD_BACK)
    upstream.receive(data[:at])
    for start in range(at, len(data), size):
        upstream.receive(data[start : min(start + size, len(data))])


def check_pieces(one: Rig, upstream: FakeTransport, row: Message, what: Told) -> None:
    received, client = one.client.take(), one.client
    if what.failed and b"x-dstack-mesh-error" not in received:
        # The head had gone when the fault came: the client sees a response without its end.
        assert client.aborted
        assert what.client == one.records[0].code == "upstream_protocol_error"
        assert not read(received, what, ended=True).whole
    elif what.failed:
        assert client.aborted is False
        assert b"\r\nx-dstack-mesh-error: %b\r\n" % what.client.encode() in received
        # Byte by byte, interim responses have gone before the fault came, and nothing else has.
        before = received[: received.find(b"HTTP/1.1 502 Bad Gateway\r\n")]
        seen = read(before, what, ended=False)
        assert (seen.status, len(seen.interims)) == (0, before.count(b"\r\n\r\n"))
        assert len(seen.interims) <= MAX_INTERIM_RESPONSES
        assert before in (b"", row.passed_on) or not row.passed_on
    else:
        assert without_chunks(received) == without_chunks(row.passed_on)
        assert client.aborted is (what.client == "cut")
    if what.client_kept and not client.aborted:
        assert (client.is_closing(), client.ended) == (False, False)
    assert [idle.transport for idle in one.lane.idle] == ([upstream] if what.pooled else [])
    assert what.pooled or what.client == "tunnel" or upstream.is_closing()


def without_chunks(data: bytes) -> bytes:
    """Give a response with its chunks put together to one: where they begin says nothing."""
    at = data.find(b"Transfer-Encoding: chunked\r\n")
    start = data.find(b"\r\n\r\n", at) + 4
    if at < 0:
        return data
    payload, rest = b"", data[start:]
    while match := re.match(rb"([0-9a-f]+)\r\n", rest):
        size = int(match[1], 16)
        if size == 0:
            break
        assert rest[match.end() + size :].startswith(b"\r\n")
        payload += rest[match.end() : match.end() + size]
        rest = rest[match.end() + size + 2 :]
    return data[:start] + b"[" + payload + b"]" + rest


async def test_a_second_response_is_no_answer_to_a_second_request() -> None:
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    async with rig() as one:
        one.client.receive(GET_1 * 2)
        first = await one.connect()
        first.receive(OK + evil)
        assert first.aborted
        second = await one.connect()
        assert one.client.take() == OK
        second.receive(OK)
        assert (one.client.take(), one.connector.asked) == (OK, [])


async def test_an_answer_before_its_request_is_nobody_s() -> None:
    async with rig() as one:
        upstream = Upstream(one.lane)
        transport = FakeTransport(upstream)
        upstream.connection_made(transport)
        transport.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await one.turn()
        assert transport.aborted
        assert upstream.gone


# By another reader.

# RFC 9112 7.1.1 has a recipient take this white space out; h11 refuses it.
_NOT_READ_BY_H11 = {"response-chunks/white-space-before-extension"}


@passed_on
def test_what_is_passed_on_is_one_response_to_another_reader(row: Message) -> None:
    what = told(row)
    seen = read(row.passed_on, what, ended=what.client in ("close", "cut"))
    if what.failed:
        assert (seen.status, seen.whole) == (0, False)
        assert seen.interims
        return
    if what.client == "cut":
        # To HTTP/1.0 only the reset tells that a body without a length is incomplete.
        assert seen.status
        assert seen.whole is (what.minor == 0 and b"Content-Length" not in row.passed_on)
        return
    assert seen.whole
    assert seen.behind == b""
    assert b"\n" not in row.passed_on.replace(b"\r\n", b"") or seen.body
    meant = read(row.sent, what, ended=what.end in ("eof", "fin"))
    if row.id in _NOT_READ_BY_H11:
        assert not meant.whole
        return
    assert meant.whole, "h11 itself does not read what the upstream sent"
    assert (seen.status, seen.body) == (meant.status, meant.body)
    assert seen.interims == (meant.interims if what.minor else [])
    assert set(seen.trailers) <= set(meant.trailers)


def test_each_rule_is_written_down() -> None:
    """Each heading of the table is a rule of docs/http.md, and each rule there has its rows."""
    text = (Path(__file__).parents[2] / "docs" / "http.md").read_text(encoding="utf-8")
    written = set(re.findall(r"^\| `(response-[a-z0-9.-]+)`", text, re.MULTILINE))
    assert {row.rule for row in ROWS} == written


def test_the_table_is_as_large_as_it_says() -> None:
    assert len(ROWS) >= 190
    assert sum(len(told(row).directions) for row in ROWS) >= 380

"""Every row of requests.txt through real sidecars, both ways; in pieces; and as h11 reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import h11
import pytest
import pytest_asyncio

from tests.http.corpus import Message, requests
from tests.http.exchange import Got, Told, read_requests, read_responses
from tests.http.stage import IN, OUT, Side, run, stage
from tests.relay.fakes import FakeTransport, Rig, rig

ROWS = requests()
Sides = Callable[[str], Side]


def ways(direction: str) -> list[object]:
    """Give the rows that go one way, with their ids."""
    only = {OUT: "@in", IN: "@out"}[direction]
    return [pytest.param(row, id=row.id) for row in ROWS if not row.name.endswith(only)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sides(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sides]:
    async with stage(tmp_path_factory.mktemp("world")) as both:
        yield both


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("row", ways(OUT))
async def test_outbound(sides: Sides, row: Message) -> None:
    await run(sides(OUT), row)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("row", ways(IN))
async def test_inbound(sides: Sides, row: Message) -> None:
    await run(sides(IN), row)


def test_the_table_is_large_and_says_each_thing_once() -> None:
    assert len(ROWS) >= 280
    both = [(row.sent, row.name.rpartition("@")[2] if "@" in row.name else "") for row in ROWS]
    assert len(set(both)) == len(both)


# An independent strict reader of what goes on.


@dataclass(frozen=True)
class Read:
    """A request as h11 read it."""

    method: bytes
    target: bytes
    body: bytes
    trailers: list[tuple[bytes, bytes]]


def h11_reads(data: bytes) -> list[Read]:
    """Give the whole requests in `data`; raises where h11 refuses one."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    reader.receive_data(data)
    found: list[Read] = []
    head: h11.Request | None = None
    body = b""
    while True:
        event = reader.next_event()
        if isinstance(event, h11.Request):
            head, body = event, b""
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            found.append(Read(head.method, head.target, body, list(event.headers)))
            reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            reader.send(h11.EndOfMessage())
            reader.start_next_cycle()
        else:
            assert event is h11.NEED_DATA, event
            return found


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if row.passed_on])
def test_h11_reads_what_goes_on_as_the_same_messages(row: Message) -> None:
    data = row.passed_on.replace(b"{own}", b"192.0.2.9\r\n").replace(b"{host}", b"a")
    whole, part = read_requests(data)
    read = h11_reads(data)
    assert [(one.method, one.target, one.body) for one in read] == [
        (one.method, one.target, one.body) for one in whole
    ]
    assert [b"".join(b"%b: %b\r\n" % pair for pair in one.trailers) for one in read] == [
        _lower_names(one.trailers) for one in whole
    ]
    told = Told.parse(row.told)
    answered = [status for status, code in told.answers if not code]
    if "own-answer" not in row.name:
        assert len(answered) == len(whole), "each whole message, and nothing else, is answered"
    assert not part or told.end == "waits"


def _lower_names(lines: bytes) -> bytes:
    pairs = [line.partition(b": ") for line in lines.split(b"\r\n") if line]
    return b"".join(b"%b: %b\r\n" % (name.lower(), value) for name, _, value in pairs)


# In pieces.


@dataclass(frozen=True)
class Outcome:
    """What became of a client's bytes, whatever the pieces were in which they came."""

    whole: list[tuple[bytes, bytes, bytes, bytes]]
    """Requests at the origin: method, target, body, trailers."""
    heads: list[list[tuple[bytes, bytes]]]
    answers: list[tuple[int, str, bytes]]
    ended: bool


PLAIN = b"HTTP/1.1 200 OK\r\nX-Origin: y\r\nContent-Length: 2\r\n\r\nok"
TO_HEAD = PLAIN[:-2]


async def in_pieces(data: bytes, size: int) -> Outcome:
    async with rig() as one:
        for at in range(0, len(data), size):
            if one.client.is_closing():
                break
            one.client.receive(data[at : at + size])
            if at < 64:  # so that the connection comes about between two pieces, too
                await one.turn()
        origin = await _settle(one)
        requests_, part = read_requests(origin)
        got, rest = read_responses(one.client.take(), [r.method for r in requests_])
        assert rest == b""
        ended = one.client.ended or one.client.is_closing()
        if part:
            transport = one.upstream
            one.client.break_off()
            await one.turn()
            assert transport.lost
            assert transport.take() == b"", "a broken message must never get its end"
        return Outcome(
            [(r.method, r.target, r.body, r.trailers) for r in requests_],
            [r.fields for r in requests_],
            [_without_id(one) for one in got],
            ended,
        )


async def _settle(one: Rig) -> bytes:
    """Answer at the origin until nothing moves; give all that came there."""
    received: dict[FakeTransport, bytes] = {}
    answered: dict[FakeTransport, int] = {}
    moved = True
    while moved:
        await one.turn()
        moved = bool(one.connector.asked)
        if moved:
            await one.connect()
        for transport in one.connector.opened:
            received[transport] = received.get(transport, b"") + transport.take()
            whole, _ = read_requests(received[transport])
            for request in whole[answered.get(transport, 0) :]:
                transport.receive(TO_HEAD if request.method == b"HEAD" else PLAIN)
                moved = True
            answered[transport] = len(whole)
    return b"".join(received.values())


def _without_id(got: Got) -> tuple[int, str, bytes]:
    """A mesh's own answer names the request by an id made for it."""
    return got.status, got.code, b"" if got.code else got.body


def sizes(row: Message) -> list[int]:
    return [1, 2, 3] if len(row.sent) < 4096 else [4093]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
async def test_any_pieces_give_the_same_result(row: Message) -> None:
    sent = row.sent.replace(b"{T}", b"").replace(b"{-}", b"").replace(b"{id}", b"0" * 40)
    at_once = await in_pieces(sent, len(sent))
    told = Told.parse(row.told)
    if "@" not in row.name and "{host}" not in str(row.passed_on):
        assert [(status, code) for status, code, _ in at_once.answers] == told.answers
        assert at_once.ended is (told.end == "close")
        whole = read_requests(row.passed_on)[0]
        assert at_once.whole == [(r.method, r.target, r.body, r.trailers) for r in whole]
        assert at_once.heads == [r.fields for r in whole]
    for size in sizes(row):
        assert await in_pieces(sent, size) == at_once, size

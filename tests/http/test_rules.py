"""docs/http.md and its tests name the same rules; and the rules that are not about one message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.wire import limits
from tests.http import corpus
from tests.http.exchange import read_requests
from tests.integration.harness import eventually
from tests.relay.fakes import GET_1, OK, FakeTransport, Rig, rig

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs" / "http.md"
GET_2 = b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n"
GET_3 = b"GET /3 HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"POST /1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def answer(text: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


# The documentation and the tables.


def documented() -> list[str]:
    """Give the rules that the page's tables name in their first column."""
    return re.findall(r"^\| `([a-z0-9.-]+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


def tabled() -> set[str]:
    rows = corpus.requests()
    if (HERE / "responses.txt").exists():
        rows += corpus.responses()
    return {row.rule for row in rows}


def named() -> set[str]:
    """Give what the functions of these tests are named after."""
    texts = [path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py")]
    names = re.findall(r"^(?:async )?def test_(\w+)\(", "\n".join(texts), re.MULTILINE)
    return {name.replace("_", "-") for name in names}


def test_each_rule_is_documented_once() -> None:
    rules = documented()
    assert len(rules) > 50
    assert sorted(rules) == sorted(set(rules))


@pytest.mark.parametrize("rule", documented())
def test_each_rule_has_a_test(rule: str) -> None:
    of_its_name = [name for name in named() if f"{name}-".startswith(f"{rule}-")]
    assert rule in tabled() or of_its_name


@pytest.mark.parametrize("table", ["requests.txt", "responses.txt"])
def test_each_heading_of_a_table_is_a_rule(table: str) -> None:
    if not (HERE / table).exists():
        pytest.skip(f"there is no {table}")
    headings = re.findall(r"^## (.*)$", (HERE / table).read_text(encoding="ascii"), re.MULTILINE)
    assert headings
    assert sorted(headings) == sorted(set(headings))
    assert set(headings) <= set(documented())


def test_the_page_names_the_limits_as_they_are() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert limits.MAX_HEAD_BYTES == 64 * 1024
    assert limits.MAX_REQUEST_TARGET_BYTES == 16 * 1024
    assert limits.MAX_REQUEST_LINE_BYTES == 17 * 1024
    assert f"{limits.MAX_FIELDS} field lines" in text
    assert f"{limits.MAX_CHUNK_SIZE_DIGITS} digits" in text
    assert f"{limits.MAX_CHUNK_LINE_BYTES:,} bytes" in text


# How something is refused.

REFUSED_HEADS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"\x16\x03\x01\x02\x00",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 128 + b"\r\n",
    b"GET /" + b"a" * 16_384 + b" HTTP/1.1\r\n",
]


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("head", REFUSED_HEADS, ids=range(len(REFUSED_HEADS)))
async def test_refusal_closes(head: bytes, tls: bool) -> None:
    """What is behind it, in the same read or in a later one, is read by nobody."""
    async with rig() as one:
        client = one.accept(tls=tls)
        client.receive(head + GET_1)
        client.receive(GET_2)
        await one.turn()
        sent = client.take()
        assert sent.count(b"HTTP/1.1 ") == 1
        assert b"\r\nConnection: close\r\n" in sent
        assert client.ended is not tls
        client.receive(GET_3)
        await one.turn()
        assert client.take() == b""
        assert not one.connector.asked
        client.receive_eof()
        await one.turn()
        assert client.lost
        assert not client.aborted, "a reset could destroy the answer"


async def test_refusal_closes_behind_a_body() -> None:
    async with rig() as one:
        one.client.receive(CHUNKED + b"x\r\n\r\n" + GET_2)
        await one.connect()
        assert one.client.take().startswith(b"HTTP/1.1 400 ")
        one.client.receive(GET_3)
        await one.turn()
        assert one.client.take() == b""
        assert one.upstream.take() == b""
        assert one.client.ended


@pytest.mark.parametrize("tls", [False, True])
async def test_refusal_lingers(tls: bool) -> None:
    """A client that goes on sending is read, and forgotten, until the time for it is over."""
    async with rig(Timeouts(linger=0.2)) as one:
        client = one.accept(tls=tls)
        client.receive(b"GET / HTTP/1.1\r\n\r\n")
        assert client.take().startswith(b"HTTP/1.1 400 ")
        for _ in range(5):
            client.receive(b"x" * 100_000)
            await one.turn()
            assert client.waiting == 0, "what is not read turns into a reset"
            assert not client.is_closing()
        await eventually(lambda: client.lost)
        assert client.take() == b""


# Connections to the next hop.


async def another_client(one: Rig) -> FakeTransport:
    """Have another client ask; hold that it is given a connection of its own; give that client."""
    opened = len(one.connector.opened)
    client = one.accept()
    client.receive(GET_2)
    transport = await one.connect()
    assert len(one.connector.opened) == opened + 1
    transport.receive(answer(b"fresh"))
    await one.turn()
    assert transport.take() == GET_2
    assert client.take() == answer(b"fresh")
    return client


async def test_pool_after_error_in_a_body() -> None:
    async with rig() as one:
        first = await one.exchange(GET_1, OK)
        one.client.receive(CHUNKED + b"3\r\nabc\r\n")
        await one.turn()
        assert first.take() == GET_1 + CHUNKED + b"3\r\nabc\r\n"
        one.client.receive(b"4\r\nabcde\r\n0\r\n\r\n")
        await one.turn()
        assert one.client.take().startswith(OK + b"HTTP/1.1 400 ")
        assert first.lost
        assert first.take() == b"", "the message must not get its end"
        await another_client(one)


async def test_pool_after_error_by_leaving() -> None:
    """A client that leaves in the midst of its body, or before it has its answer."""
    for sent in (CHUNKED + b"3\r\nabc\r\n", GET_1):
        async with rig() as one:
            one.client.receive(sent)
            first = await one.connect()
            assert first.take() == sent
            one.client.break_off()
            await one.turn()
            assert first.lost
            assert first.take() == b""
            await another_client(one)


async def test_pool_after_error_by_an_early_answer() -> None:
    """The rest of the body may still be read as a body there, or as a request."""
    async with rig() as one:
        one.client.receive(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\n\r\n")
        first = await one.connect()
        first.receive(OK)
        await one.turn()
        assert first.lost
        assert b"\r\nConnection: close\r\n" in one.client.take()
        first_bytes = first.take()
        one.client.receive(b"GET /smuggled HTTP/1.1\r\nHost: a\r\n")
        await one.turn()
        assert first_bytes.endswith(b"Content-Length: 33\r\n\r\n")
        assert first.take() == b""
        await another_client(one)


async def test_answers_not_mixed() -> None:
    """Two answers to one request: the second belongs to nobody."""
    async with rig() as one:
        first = await one.exchange(GET_1, OK + answer(b"forged"))
        assert first.lost
        assert one.client.take() == OK
        await another_client(one)
        assert one.client.take() == b""


async def test_answers_not_mixed_by_the_pool() -> None:
    async with rig() as one:
        first = await one.exchange(GET_1, OK)
        assert first.is_reading(), "what comes unasked must be seen"
        first.receive(answer(b"forged"))
        await one.turn()
        assert first.lost
        await another_client(one)
        assert one.client.take() == OK


async def test_answers_not_mixed_among_many_clients() -> None:
    """Clients that share a pool, answered in another order than they asked in."""
    async with rig() as one:
        clients = [one.accept() for _ in range(8)]
        for number, client in enumerate(clients):
            client.receive(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
        for _ in clients:
            await one.connect()
        for transport in reversed(one.connector.opened):
            [[request], rest] = read_requests(transport.take())
            assert rest == b""
            transport.receive(answer(b"for " + request.target))
        await one.turn()
        for number, client in enumerate(clients):
            assert client.take() == answer(b"for /%d" % number)


async def test_retry_only_idempotent() -> None:
    async with rig() as one:
        for sent, again in (
            (GET_2, True),
            (GET_2.replace(b"GET", b"DELETE"), True),
            (GET_2.replace(b"GET", b"POST"), False),
            (b"PUT /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", False),
        ):
            client = one.accept()
            client.receive(GET_1)
            pooled = await one.connect()
            pooled.receive(OK)
            await one.turn()
            assert pooled.take() == GET_1
            assert client.take() == OK
            client.receive(sent)
            await one.turn()
            assert pooled.take() == sent
            pooled.break_off()
            await one.turn()
            assert bool(one.connector.asked) is again
            if again:
                second = await one.connect()
                assert second.take() == sent
                second.break_off()  # and once is enough
                await one.turn()
                assert not one.connector.asked
            assert client.take().startswith(b"HTTP/1.1 502 ")


# One request behind another.


async def test_pipelining_order() -> None:
    async with rig() as one:
        one.client.receive(GET_1 + GET_2 + GET_3)
        transport = await one.connect()
        for request, text in ((GET_1, b"1"), (GET_2, b"2"), (GET_3, b"3")):
            assert transport.take() == request, "the next one waits for this one's answer"
            head, body = answer(text)[:-1], answer(text)[-1:]
            transport.receive(head)
            await one.turn()
            assert transport.take() == b""
            transport.receive(body)
            await one.turn()
            assert one.client.take() == answer(text)
        assert len(one.connector.opened) == 1


async def test_pipelining_order_across_connections() -> None:
    """An answer that closes the first connection does not let the second request overtake."""
    last = OK.replace(b"Content-Length", b"Connection: close\r\nContent-Length")
    async with rig() as one:
        one.client.receive(GET_1 + GET_2)
        first = await one.connect()
        assert first.take() == GET_1
        assert not one.connector.asked
        first.receive(last)
        second = await one.connect()
        assert second is not first
        assert second.take() == GET_2
        second.receive(answer(b"2"))
        await one.turn()
        assert one.client.take() == OK + answer(b"2")


async def test_pipelining_bounded() -> None:
    size = len(GET_2)
    count = 1_000_000 // size
    async with rig() as one:
        one.client.receive(GET_1 + GET_2 * count)
        first = await one.connect()
        assert not one.client.reading
        held = size * count - one.client.waiting
        assert held <= len(one.worker.buffer)
        first.receive(OK)
        await one.turn()
        assert first.take() == GET_1 + GET_2


async def test_upgrade_accepted() -> None:
    """What is sent early waits for the 101, and nothing of it is read as a request."""
    fields = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    head = b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n" % fields
    async with rig() as one:
        one.client.receive(head + GET_2)
        transport = await one.connect()
        sent = transport.take()
        assert sent.startswith(b"GET / HTTP/1.1\r\n")
        assert b"/2" not in sent
        transport.receive(b"HTTP/1.1 101 Switching Protocols\r\n%b\r\nhello" % fields)
        await one.turn()
        assert transport.take() == GET_2
        assert one.client.take().endswith(b"\r\n\r\nhello")
        one.client.receive(GET_3)
        await one.turn()
        assert transport.take() == GET_3
        one.client.receive_eof()
        await one.turn()
        assert transport.lost, "it is never pooled"


# Limits of time and number.


async def test_limit_head_time() -> None:
    """From the head's first byte on: one byte after the other does not help."""
    async with rig(Timeouts(head=0.1)) as one:
        quiet = one.accept()
        for byte in b"GET / HTTP/1.1\r\nX: " + b"y" * 10_000:
            one.client.receive(bytes([byte]))
            await one.turn()
            if one.client.lost:
                break
        await eventually(lambda: one.client.lost)
        assert one.client.aborted
        assert one.client.take() == b""
        assert not quiet.lost, "who has not begun a head has the idle time"


async def test_limit_head_time_of_a_second_request() -> None:
    async with rig(Timeouts(head=0.1)) as one:
        await one.exchange(GET_1 + b"GET /2", OK)
        assert one.client.take() == OK
        await eventually(lambda: one.client.lost)


async def test_limit_idle_time() -> None:
    async with rig(Timeouts(idle=0.2)) as one:
        busy, quiet = one.accept(), one.accept()
        busy.receive(GET_1)
        transport = await one.connect()
        await eventually(lambda: quiet.lost)
        assert not busy.lost, "an exchange under way is not idle"
        transport.receive(OK)
        await one.turn()
        assert busy.take() == OK
        await eventually(lambda: busy.lost)


async def test_limit_connections() -> None:
    async with rig(max_connections=3) as one:
        held = [one.client, one.accept(), one.accept()]
        more = one.accept()
        told = more.take()
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"x-dstack-mesh-error: overloaded\r\n" in told
        assert b"MESH_MAX_CONNECTIONS" in told
        assert b"\r\nConnection: close\r\n" in told
        held[1].break_off()
        await one.turn()
        held[0].receive(GET_1)
        transport = await one.connect()
        transport.receive(OK)
        await one.turn()
        assert held[0].take() == OK
        assert one.accept().take() == b""

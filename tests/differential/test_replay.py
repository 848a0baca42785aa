"""What the mesh passes on, in one piece onto a connection to nginx and HAProxy, with no mesh."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.differential.account import Meant, Seen
from tests.differential.client import BrokenOffError, Caller
from tests.differential.excuses import REFUSALS, Refusal, excuse
from tests.differential.haproxy import haproxy
from tests.differential.nginx import nginx
from tests.http.corpus import Message, requests
from tests.http.exchange import read_requests

ROWS = [row for row in requests() if row.passed_on]
RULES = list(dict.fromkeys(row.rule for row in ROWS))
PEERS = ("nginx", "haproxy")


def messages(row: Message) -> list[tuple[Meant, bytes]]:
    """Give the whole requests that the mesh passes on for a row, by the table's account."""
    data = row.passed_on.replace(b"{host}", b"a").replace(b"{own}", b"192.0.2.9\r\n")
    whole, _ = read_requests(data)
    return [
        (
            Meant(
                one.method.decode("ascii"),
                one.target.decode("ascii"),
                len(one.raw),
                complete=True,
                head=one.raw[: one.raw.index(b"\r\n\r\n")] + b"\r\n\r\n",
            ),
            one.raw,
        )
        for one in whole
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PEERS)
async def peer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Caller]:
    directory = tmp_path_factory.mktemp(request.param)
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "nginx":
            address = (await stack.enter_async_context(nginx(directory))).address
        else:
            address = (await stack.enter_async_context(haproxy(directory))).address
        caller = Caller(address)
        stack.push_async_callback(caller.hang_up)
        yield caller


async def replay(caller: Caller, name: str, row: Message) -> str | None:
    """Send a row's messages and a sentinel in one piece; tell where the answers are not theirs."""
    sentinel = f"/sentinel/{row.line}"
    line = f"GET {sentinel} HTTP/1.1\r\nHost: a\r\n\r\n".encode("ascii")
    sent = [*messages(row), (Meant("GET", sentinel, len(line), complete=True), line)]
    await caller.send(b"".join(data for _, data in sent))
    for message, _ in sent:
        try:
            answer = await caller.answer(message.method)
        except BrokenOffError as error:
            return f"no answer to {message}: {error}"
        echoed = f"{message.method} {message.target}\n".encode("ascii")
        if answer.status == 200 and answer.body == (b"" if message.method == "HEAD" else echoed):
            continue
        seen = Seen("", "", answer.status, complete=False)
        if excuse(name, message, seen) is None:
            return f"{message} is answered by {answer}"
        if not caller.connected or answer.fields.get(b"connection") == b"close":
            await caller.hang_up()
            return None
    return None


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("rule", RULES)
async def test_as_many_answers_as_messages(
    peer: Caller, rule: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["peer"]
    problems = [
        f"{row.id} (line {row.line}): {problem}"
        for row in ROWS
        if row.rule == rule and (problem := await replay(peer, name, row)) is not None
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda one: one.reason)
def test_each_exception_is_needed(refusal: Refusal) -> None:
    assert any(refusal.applies(message) for row in ROWS for message, _ in messages(row))

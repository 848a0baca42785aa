"""Responses of a target: raw TLS origin -> sidecar -> nginx, HAProxy or h11 -> client."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from dstack_mesh.model import AppId
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.service import Service
from dstack_mesh.wire.translate import Response, ResponseRules
from tests.differential.account import Ledger
from tests.differential.client import Answer, BrokenOffError, Caller, read_answer
from tests.differential.excuses import excuse_front
from tests.differential.haproxy import haproxy_front
from tests.differential.nginx import nginx_front
from tests.differential.quiet import until
from tests.http.corpus import Message, responses
from tests.integration.harness import Mesh, Wire, origin, request
from tests.integration.tls_peers import new_app_id

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = responses()
RULES = list(dict.fromkeys(row.rule for row in ROWS))


class Target:
    """An origin that sends rows as they are, and answers every other request properly."""

    def __init__(self) -> None:
        self.row: Message | None = None
        """What the next request for `/row/...` gets."""
        self.service: Service | None = None
        """The mesh's end of what asks for it."""
        self.last: Wire | None = None
        """The connection by which it came."""
        self.sent = False
        """Whether it has been sent."""
        self.late = False
        """Whether some of it was sent when the mesh had had a whole response."""

    async def serve(self, wire: Wire) -> None:
        while True:
            method, target, _ = (await wire.head()).split(b" ", 2)
            if not target.startswith(b"/row/"):
                await wire.send(_echo(method, target))
                continue
            assert self.row is not None
            self.last = wire
            await self._send(wire, self.row)
            ends = {"eof", "fin", "reset"}.intersection(self.row.told.split())
            if "fin" in ends:
                _fin(wire)
                await wire.to_end()
            elif "reset" in ends:
                wire.reset()
            if ends:
                wire.finished = True
                return

    async def _send(self, wire: Wire, row: Message) -> None:
        data = row.sent
        self.late = False
        if "apart" in row.told.split():
            head, end, data = data.partition(b"\r\n\r\n")
            await wire.send(head + end)
            await until(lambda: self.head_has_gone)
            self.late = bool(data) and not self._running()
        await wire.send(data)
        self.sent = True

    def _running(self) -> list[Exchange]:
        assert self.service is not None
        exchanges = [getattr(one, "_exchange", None) for one in self.service.connections]
        return [one for one in exchanges if one is not None]

    @property
    def head_has_gone(self) -> bool:
        """Whether the mesh has passed on, or refused, what came of the row so far."""
        running = self._running()
        return not running or any(
            one._response is not None and one._response.touched for one in running
        )

    @property
    def settled(self) -> bool:
        """Whether the row is sent, and where it came too late to be an answer, its connection over.

        What comes just when the next request has gone would be that one's answer, to any client.
        """
        wire = self.last
        return self.sent and (not self.late or (wire is not None and (wire.ended or wire.finished)))


def _echo(method: bytes, target: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(target)
    return head if method == b"HEAD" else head + target


def _fin(wire: Wire) -> None:
    """End the TCP connection in order, and TLS without its close-notify."""
    number = wire._writer.get_extra_info("socket").fileno()
    with socket.socket(fileno=os.dup(number)) as own, contextlib.suppress(OSError):
        own.shutdown(socket.SHUT_WR)


@dataclass
class Front:
    """A client of the mesh, or a proxy that is one, with our own client before it."""

    name: str
    caller: Caller
    ledger: Ledger
    target: Target
    app_id: AppId
    number: int = 0

    async def run(self, row: Message, method: str) -> list[str]:
        """Ask for a row, then for a sentinel; give what is wrong with the answers."""
        self.number += 1
        self.target.row, self.target.sent = row, False
        since = len(self.ledger.exchanges)
        await self._send(method, f"/row/{self.number}")
        await until(lambda: len(self.ledger.exchanges) > since)
        exchange = self.ledger.exchanges[since]
        if excuse_front(self.name, exchange) is None:
            problems = compare(row, method, await self._answer(method), exchange)
        else:
            await self.caller.hang_up()
            problems = []
        await until(lambda: self.target.settled)
        problems += await self.sentinel(f"/sentinel/{self.number}")
        if (count := len(self.ledger.exchanges) - since) != 2:
            problems.append(f"{count} exchanges in place of 2")
        return problems

    async def sentinel(self, target: str) -> list[str]:
        """Ask for what no row has to do with; give what is wrong with the answer."""
        await self._send("GET", target)
        own = await self._answer("GET")
        if own is None:  # the connection ended before the request came
            await self._send("GET", target)
            own = await self._answer("GET")
        if own is None or (own.status, own.body) != (200, target.encode("ascii")):
            return [f"the sentinel's answer is {own}"]
        return []

    async def _send(self, method: str, target: str) -> None:
        fields = [("x-dstack-target-app", self.app_id)]
        await self.caller.send(request(method, target, fields))

    async def _answer(self, method: str) -> Answer | None:
        try:
            return await self.caller.answer(method)
        except BrokenOffError:
            return None


def compare(row: Message, method: str, answer: Answer | None, exchange: Exchange) -> list[str]:
    """Tell what is wrong with a client's answer, by the mesh's account of the exchange."""
    response = exchange._response
    assert response is not None, "the row's request never came to the target"
    if not exchange.code:
        meant = _meant(row, method)
        got = answer and (answer.status, answer.body)
        return [] if got == meant else [f"the mesh meant {meant}, the client has {answer}"]
    own = answer and (answer.status, answer.fields.get(b"x-dstack-mesh-error"))
    if own == (exchange.status, exchange.code.encode("ascii")):
        return []
    # Broken off behind its head: a proxy may say so, but nobody may have a whole response.
    broken = answer is None or (
        answer.status == 502 and b"x-dstack-mesh-error" not in answer.fields
    )
    if broken and response.status == exchange.status:
        return []
    return [f"the mesh failed with {exchange.status} {exchange.code}, the client has {answer}"]


def _meant(row: Message, method: str) -> tuple[int, bytes]:
    """Give status and body of what the mesh passes on for a row, as h11 reads it."""
    response = Response(method.encode("ascii"), 1, b"", ResponseRules(remote_errors=True))
    passed_on = response.feed(row.sent)
    if not response.done:
        passed_on += response.end(clean=True) or b""
    answer = read_answer(passed_on, method)
    assert answer is not None, f"h11 does not read one whole response in {passed_on!r}"
    return answer.status, answer.body


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["nginx", "haproxy", "h11"])
async def front(
    request: pytest.FixtureRequest, one: Mesh, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    directory = tmp_path_factory.mktemp(request.param)
    target, app_id = Target(), new_app_id()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    one.world.kms.issue(app_id).load_into(tls)
    async with contextlib.AsyncExitStack() as stack:
        _, address = await stack.enter_async_context(origin(target.serve, tls=tls))
        one.world.gateway.add_route(app_id, address.host, address.port)
        sidecar = await one.start("a", backend=False)
        stack.push_async_callback(sidecar.stop)
        mesh = one.outbound("a")
        if request.param == "nginx":
            mesh = await stack.enter_async_context(nginx_front(directory, mesh, app_id))
        elif request.param == "haproxy":
            mesh = await stack.enter_async_context(haproxy_front(directory, mesh, app_id))
        caller = Caller(mesh)
        stack.push_async_callback(caller.hang_up)
        ledger = Ledger(sidecar, "outbound")
        target.service = ledger.service
        yield Front(request.param, caller, ledger, target, app_id)


@pytest.mark.parametrize("rule", RULES)
async def test_one_response_and_no_byte_of_another(front: Front, rule: str) -> None:
    problems: list[str] = []
    for row in ROWS:
        if row.rule == rule:
            method = "HEAD" if "HEAD" in row.told.split() else "GET"
            found = await front.run(row, method)
            problems += [f"{row.id} (line {row.line}): {problem}" for problem in found]
    assert not problems, "\n".join(problems)


async def test_an_answer_that_nobody_asked_for_ends_the_pooled_connection(front: Front) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    row = Message("pool", "late", answer, answer, "GET kept kept", 0)
    assert await front.run(row, "GET") == []
    wire = front.target.last
    assert wire is not None
    assert not wire.ended, "the connection was not kept"
    await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
    await until(lambda: wire.ended)
    assert await front.sentinel("/sentinel/late") == []

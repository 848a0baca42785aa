"""Sends the corpus through a sidecar to a peer, row after row, and compares the two accounts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from dstack_mesh.model import TcpAddress
from dstack_mesh.relay.downstream import Downstream
from tests.differential.account import (
    Ledger,
    Seen,
    UnreadableError,
    disagreements,
    read_bodies,
)
from tests.differential.excuses import excuse
from tests.differential.quiet import accepted, serves_on, settled, until
from tests.differential.tap import Link, Tap
from tests.http.corpus import Message
from tests.http.exchange import read_requests
from tests.integration.harness import Client, request

_numbers = itertools.count(1)


class Peer(Protocol):
    """An independent reader of what the mesh passes on."""

    name: str
    address: TcpAddress

    def seen(self, port: int) -> list[Seen]:
        """Give what was understood, so far, on connections from `port`."""
        ...

    def counts(self) -> dict[int, int]:
        """Give how many requests were understood, so far, from each port."""
        ...


@dataclass
class Stage:
    """One of a sidecar's listeners, with a peer behind it."""

    listener: TcpAddress
    ledger: Ledger
    tap: Tap
    peer: Peer
    tls: ssl.SSLContext | None = None
    """How a caller shows itself; None: the listener is plain, and the tap is before a TLS peer."""
    app_id: str = ""
    """The target app that a request must name to be sent to the peer; empty: none."""
    _rows: tuple[Client, Downstream[Any]] | None = None
    """The connection that rows come by, and the mesh's end of it."""
    _sentinels: Client | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Stage]:
        """Hold open, for the block, the connection that all sentinels come by."""
        async with Client.connect(self.listener, self.tls) as self._sentinels:
            try:
                yield self
            finally:
                await self._hang_up()

    def _dressed(self, data: bytes) -> bytes:
        """Write the placeholders out that the table of requests has for target headers."""
        line = b"x-dstack-target-app: %b\r\n" % self.app_id.encode() if self.app_id else b""
        data = data.replace(b"{id}", self.app_id.encode())
        if b"{T}" in data or b"{-}" in data:
            return data.replace(b"{T}", line).replace(b"{-}", b"")
        first, crlf, rest = data.partition(b"\r\n")
        return first + crlf + (line if crlf else b"") + rest

    async def _send(self, row: Message) -> None:
        """Send a row's bytes, and wait until nothing is left to do for them.

        Rows share a connection as far as the mesh lets them: handshakes are what costs time here.
        """
        if self._rows is None or not serves_on(self._rows[1]):
            await self._hang_up()
            client = await self._connected()
            self._rows = client, await accepted(self.ledger.service, client)
        client, connection = self._rows
        client.writer.write(self._dressed(row.sent))
        await settled(self.ledger.service, connection, client)
        if not serves_on(connection):
            await self._hang_up()

    async def _connected(self) -> Client:
        address = self.listener
        return Client(*await asyncio.open_connection(address.host, address.port, ssl=self.tls))

    async def _hang_up(self) -> None:
        if self._rows is not None:
            writer, self._rows = self._rows[0].writer, None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def run(self, row: Message) -> list[str]:
        """Send a row, then a sentinel; give what mesh and peer disagree on."""
        since = len(self.ledger.exchanges)
        self.tap.forget_what_is_over()
        marks = {id(link): len(link.sent) for link in self.tap.links}
        counts = self.peer.counts()
        await self._send(row)
        target = f"/sentinel/{next(_numbers)}"
        problems = await self._sentinel(target)
        links = [link for link in self.tap.links if len(link.sent) > marks.get(id(link), 0)]
        meant = self.ledger.meant(since)
        seen = await self._seen(links, counts, target, sum(one.complete for one in meant))
        if self.tls is not None:
            sent = [bytes(link.sent[marks.get(id(link), 0) :]) for link in links]
            try:
                meant = read_bodies(meant, sent)
            except UnreadableError as error:
                problems.append(str(error))
        if [(one.method, one.target) for one in meant if one.complete] != [
            *_whole(row),
            ("GET", target),
        ]:
            problems.append(
                f"the table has the mesh pass on {_whole(row)} and no more, not {meant}"
            )
        problems += disagreements(meant, seen, lambda m, s: excuse(self.peer.name, m, s))
        return [f"{row.id} (line {row.line}): {problem}" for problem in problems]

    async def _sentinel(self, target: str) -> list[str]:
        assert self._sentinels is not None, "not running"
        await self._sentinels.send(self._dressed(request("GET", target)))
        answer = await self._sentinels.answer()
        if (answer.status, answer.body) != (200, f"GET {target}\n".encode()):
            return [f"the sentinel's answer is {answer}"]
        return []

    async def _seen(
        self, links: list[Link], counts: dict[int, int], sentinel: str, least: int
    ) -> list[Seen]:
        """Give what the peer saw on these connections, once it has nothing more to tell.

        That is when it has ended its end of all connections that the mesh has let go of, and has
        told of as many requests as it was sent whole. If it never does, the accounts will differ.
        """

        def is_sentinel(one: Seen) -> bool:
            return one.target == sentinel

        def new() -> list[Seen]:
            told = [self.peer.seen(link.port)[counts.get(link.port, 0) :] for link in links]
            told.sort(key=lambda some: any(map(is_sentinel, some)))
            return list(itertools.chain.from_iterable(told))

        def at_rest() -> bool:
            upstreams = self.ledger.service.worker.upstreams
            held = sum(not one.transport.is_closing() for one in upstreams)
            return held == sum(not link.over.is_set() for link in self.tap.links)

        def told_all() -> bool:
            seen = new()
            return len(seen) >= least and is_sentinel(seen[-1])

        with contextlib.suppress(TimeoutError):
            await until(lambda: at_rest() and told_all())
        return new()


def _whole(row: Message) -> list[tuple[str, str]]:
    """Give method and target of the whole requests that go on, by the table's account."""
    data = row.passed_on.replace(b"{host}", b"a").replace(b"{own}", b"192.0.2.9\r\n")
    whole, _ = read_requests(data)
    return [(one.method.decode("ascii"), one.target.decode("ascii")) for one in whole]

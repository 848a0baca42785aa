"""The table of responses, row by row, over real sockets and through real sidecars, both ways.

Inbound: a backend's answer to a caller from another CVM. Outbound: a target's answer to the local
application. responses.txt says what its columns mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import cast

import pytest
import pytest_asyncio

from dstack_mesh.model import TcpAddress
from tests.http.corpus import Message
from tests.http.response_rows import Told, before_end, each_way, parts, told
from tests.integration.harness import Wire, eventually, mesh, origin
from tests.integration.tls_peers import caller_context, new_app_id


class Peer(asyncio.Protocol):
    """A client's connection: all that it received, and how it ended."""

    def __init__(self) -> None:
        self.received = b""
        self.end = ""
        """`close` for an orderly end (FIN, TLS's close-notify), `cut` for any other."""
        self.transport: asyncio.WriteTransport
        self._eof = False
        self._changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._changed.set()

    def eof_received(self) -> None:
        self._eof = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.end = "close" if self._eof and exc is None else "cut"
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds, or the connection is at its end."""
        async with asyncio.timeout(20):
            while not (condition() or self.end):
                self._changed.clear()
                await self._changed.wait()

    async def has(self, expected: bytes) -> None:
        """Wait until `expected` is there, or something that is not it."""
        await self.until(
            lambda: len(self.received) >= len(expected) or not expected.startswith(self.received)
        )

    async def take(self, count: int) -> bytes:
        """Give the next bytes; fewer where the connection ends before."""
        await self.until(lambda: len(self.received) >= count)
        data, self.received = self.received[:count], self.received[count:]
        return data

    async def expect(self, expected: bytes) -> None:
        """Take just these bytes."""
        await self.has(expected)
        data, self.received = self.received[: len(expected)], self.received[len(expected) :]
        assert data == expected

    async def problem(self, method: str) -> tuple[str, str]:
        """Take an answer of the mesh's own; give what its header and its body call the error."""
        await self.until(lambda: b"\r\n\r\n" in self.received)
        head = await self.take(self.received.find(b"\r\n\r\n") + 4)
        assert head.startswith(b"HTTP/1.1 502 Bad Gateway\r\n"), head
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        code = fields[b"x-dstack-mesh-error"].decode()
        if method == "HEAD":
            return code, code
        body = json.loads(await self.take(int(fields[b"Content-Length"])))
        return code, body["code"]


@dataclass
class Side:
    """One way through a sidecar: where clients connect, and the upstream behind it."""

    listener: TcpAddress
    tls: ssl.SSLContext | None
    fields: bytes
    """What a request needs so as to go this way."""
    arrived: list[tuple[Wire, bytes]] = field(default_factory=list)
    """Each request that reached the upstream: on which connection, and its first line."""
    idle: list[Peer] = field(default_factory=list)
    """Clients whose connections the last rows have kept."""
    row: Message | None = None
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client has what it can get so far."""

    async def client(self) -> Peer:
        """Give a connection to the sidecar: one that has served rows before, where there is one."""
        if self.idle:
            return self.idle.pop(0)
        where, name = self.listener, "b" if self.tls else None
        _, peer = await asyncio.get_running_loop().create_connection(
            Peer, where.host, where.port, ssl=self.tls, server_hostname=name
        )
        return peer

    @contextlib.asynccontextmanager
    async def clients(self, what: Told) -> AsyncIterator[tuple[Peer, Peer]]:
        """Give two clients. What is in order at the end goes on to the next rows."""
        one, other = await self.client(), await self.client()
        try:
            yield one, other
        except BaseException:
            one.transport.abort()
            other.transport.abort()
            raise
        self.idle.append(other)
        if what.client_kept:
            self.idle.append(one)
        else:
            one.transport.abort()

    async def serve(self, wire: Wire) -> None:
        """Answer with the row's bytes, or say which request it was."""
        while True:
            line = (await wire.head()).partition(b"\r\n")[0]
            self.arrived.append((wire, line))
            if b" /row " in line:
                await self._send_row(wire)
            else:
                path = line.split()[1]
                last = b"Connection: close\r\n" if path == b"/last" else b""
                await wire.send(
                    b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (last, len(path), path)
                )

    async def _send_row(self, wire: Wire) -> None:
        assert self.row is not None
        what = told(self.row)
        first, *later = parts(self.row, apart=what.apart)
        await wire.send(first)
        for part in later:
            await self._client_has_it()
            await wire.send(part)
        if what.client == "tunnel":
            assert await wire.read() == b"up"
            await wire.send(b"down")
        if what.end or what.client == "tunnel":
            await self._client_has_it()
            await end_connection(wire, what.end)
            raise EOFError

    async def _client_has_it(self) -> None:
        await self.go_on.wait()
        self.go_on.clear()


async def end_connection(wire: Wire, how: str) -> None:
    if how == "reset":
        wire.reset()
    elif how == "fin":
        # Under TLS's feet: a FIN without close-notify, as whoever cuts the wire makes it.
        with socket.socket(fileno=os.dup(wire._writer.get_extra_info("socket").fileno())) as sock:
            sock.shutdown(socket.SHUT_WR)
        await wire.to_end()
    else:
        wire.finish()


Sides = dict[str, Side]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sides(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sides]:
    """Start one mesh for all rows: sidecar `a` calls a bare TLS server, `b` has a bare backend."""
    nowhere = TcpAddress("127.0.0.1", 0)
    inbound, outbound = Side(nowhere, None, b""), Side(nowhere, None, b"")
    async with mesh(tmp_path_factory.mktemp("world")) as one:
        kms, target = one.world.kms, new_app_id()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        kms.issue(target).load_into(context)
        async with (
            origin(inbound.serve) as (_, backend),
            origin(outbound.serve, tls=context) as (_, server),
        ):
            await one.start("b", MESH_BACKEND=str(backend))
            await one.start(
                "a", backend=False, MESH_GATEWAY=f"fixed/{server}", MESH_GATEWAY_CONNECT="unset"
            )
            inbound.listener, outbound.listener = one.inbound("b"), one.outbound("a")
            inbound.tls = caller_context(kms.root_pem, kms.issue(new_app_id()))
            outbound.fields = f"x-dstack-target-app: {target}\r\n".encode()
            yield {"inbound": inbound, "outbound": outbound}
            for side in (inbound, outbound):
                for client in side.idle:
                    client.transport.abort()


@each_way
@pytest.mark.asyncio(loop_scope="module")
async def test_a_row_over_sockets(sides: Sides, way: str, row: Message) -> None:
    side, what = sides[way], told(row)
    side.row = row
    side.arrived.clear()
    side.go_on.clear()
    async with side.clients(what) as (client, next_client):
        client.transport.write(what.head("/row", side.fields))
        await check_client(side, client, row, what)
        ((wire, _),) = side.arrived
        if not what.pooled:
            await eventually(lambda: wire.ended)
        followers = [client, next_client] if what.client_kept else [next_client]
        for number, follower in enumerate(followers):
            await check_next(side, follower, f"/next-{number}")
        await check_next(side, next_client, "/last")
        assert client.received == next_client.received == b""
        on_the_same = {where is wire for where, _ in side.arrived[1:]}
        assert on_the_same == {what.pooled}


async def check_client(side: Side, client: Peer, row: Message, what: Told) -> None:
    """See to it that the client receives the row's bytes, no others, and the end that is told."""
    if what.apart:
        head, blank, _ = row.passed_on.partition(b"\r\n\r\n")
        await client.has(head + blank)
        side.go_on.set()
    await client.has(before_end(row, what))
    if what.client == "tunnel":
        client.transport.write(b"up")
        await client.has(row.passed_on + b"down")
    if what.end or what.client == "tunnel":
        side.go_on.set()
    await client.expect(row.passed_on + (b"down" if what.client == "tunnel" else b""))
    if what.failed:
        assert await client.problem(what.method) == (what.client, what.client)
    if not what.client_kept and what.client != "closing":
        await client.until(lambda: bool(client.received))
        end = "cut" if what.client == "cut" else "close"
        assert (client.received, client.end) == (b"", end)


async def check_next(side: Side, client: Peer, path: str) -> None:
    """Have a request answered with its own answer, byte for byte."""
    client.transport.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n".encode() + side.fields + b"\r\n")
    own = f"HTTP/1.1 200 OK\r\nContent-Length: {len(path)}\r\n\r\n{path}".encode()
    await client.expect(own)

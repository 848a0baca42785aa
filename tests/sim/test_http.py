"""The simulator's HTTP server, spoken to in plain bytes, so that nothing is tidied up between."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

import httpx2
import pytest

from dstack_mesh.model import AppId, TcpAddress, UnixAddress
from dstack_mesh.sim.http import HttpServer, refuse_live_socket
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.messages import Answer, Duplex, Raw, Request, Response, Upgrade

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Exchange:
    """A server with one handler, and a raw connection to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> bytes:
        async with asyncio.timeout(5):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def exactly(self, size: int) -> bytes:
        async with asyncio.timeout(5):
            return await self.reader.readexactly(size)

    async def rest(self) -> bytes:
        async with asyncio.timeout(5):
            return await self.reader.read()


async def echo(request: Request) -> Answer:
    if request.path == "/unread":
        return Response(204)
    body = await request.read()
    if request.path == "/raw":
        return Raw(b"not HTTP")
    if request.path == "/stream":
        return Response(200, [("content-type", "text/plain")], chunks(), [("x-end", "1")])
    if request.path == "/hints":
        return Response(200, [], b"ok", interim=[(103, [("link", "a")])])
    if request.path == "/upgrade":
        return Upgrade([("upgrade", "shout")], shout)
    text = f"{request.method} {request.path} {request.query} {body.decode()} {request.trailers}"
    return Response(200, [("x-first", request.headers[0][0])], text.encode())


async def chunks() -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"


async def shout(connection: Duplex) -> None:
    while data := await connection.read():
        await connection.write(data.upper())


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[Exchange]:
    server = HttpServer(echo)
    address = await server.start_tcp()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield Exchange(reader, writer)
    finally:
        writer.close()
        await server.aclose()


async def test_keep_alive_serves_requests_in_turn() -> None:
    async with served() as exchange:
        for number in (b"1", b"2"):
            await exchange.send(b"GET /a?n=" + number + b" HTTP/1.1\r\nHOST: x\r\n\r\n")
            head = await exchange.head()
            assert head.startswith(b"HTTP/1.1 200 OK\r\nx-first: HOST\r\n")
            assert await exchange.exactly(14) == b"GET /a n=" + number + b"  []"


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with served() as exchange:
        await exchange.send(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\nGET /b HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"content-length: 11" in await exchange.head()
        assert await exchange.exactly(11) == b"GET /a   []"
        await exchange.head()
        assert await exchange.exactly(11) == b"GET /b   []"


async def test_head_has_the_length_and_no_body() -> None:
    async with served() as exchange:
        await exchange.send(b"HEAD /a HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"content-length: 12\r\n" in await exchange.head()
        await exchange.send(b"HEAD /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        await exchange.head()
        assert await exchange.rest() == b""


async def test_expect_is_answered_before_the_body_comes() -> None:
    async with served() as exchange:
        await exchange.send(
            b"POST /a HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        )
        assert (await exchange.head()).startswith(b"HTTP/1.1 100 ")
        await exchange.send(b"hi")
        assert (await exchange.head()).startswith(b"HTTP/1.1 200 OK")
        assert await exchange.exactly(13) == b"POST /a  hi ["


async def test_chunked_body_and_trailers_both_ways() -> None:
    async with served() as exchange:
        await exchange.send(
            b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            b"2\r\nhi\r\n0\r\nX-End: 1\r\n\r\n"
        )
        await exchange.head()
        assert await exchange.exactly(28) == b"POST /a  hi [('X-End', '1')]"
        await exchange.send(b"GET /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b"Transfer-Encoding: chunked\r\n" in await exchange.head()
        assert await exchange.rest() == b"3\r\none\r\n3\r\ntwo\r\n0\r\nx-end: 1\r\n\r\n"


async def test_http_1_0_gets_the_body_until_the_end() -> None:
    async with served() as exchange:
        await exchange.send(b"GET /stream HTTP/1.0\r\n\r\n")
        assert b"connection: close" in (await exchange.head()).lower()
        assert await exchange.rest() == b"onetwo"


async def test_interim_and_raw_answers() -> None:
    async with served() as exchange:
        await exchange.send(b"GET /hints HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await exchange.head() == b"HTTP/1.1 103 \r\nlink: a\r\n\r\n"
        await exchange.head()
        assert await exchange.exactly(2) == b"ok"
        await exchange.send(b"GET /raw HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await exchange.rest() == b"not HTTP"


async def test_unread_body_does_not_become_the_next_request() -> None:
    async with served() as exchange:
        await exchange.send(b"POST /unread HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nGET ")
        assert (await exchange.head()).startswith(b"HTTP/1.1 204 ")
        await exchange.send(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await exchange.head()).startswith(b"HTTP/1.1 200 OK")


async def test_upgrade_hands_over_what_came_early() -> None:
    async with served() as exchange:
        await exchange.send(
            b"GET /upgrade HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: shout\r\n\r\nhey"
        )
        head = await exchange.head()
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"upgrade: shout" in head
        assert await exchange.exactly(3) == b"HEY"
        await exchange.send(b"you")
        assert await exchange.exactly(3) == b"YOU"


@pytest.mark.parametrize("data", [b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
async def test_bad_request_is_answered_and_the_connection_closed(data: bytes) -> None:
    async with served() as exchange:
        await exchange.send(data)
        assert (await exchange.head()).startswith(b"HTTP/1.1 400 ")
        await exchange.rest()


async def test_unix_socket_is_made_and_removed_and_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    address = UnixAddress(str(path))
    first, second = HttpServer(echo), HttpServer(echo)
    await first.start(address)
    with pytest.raises(OSError, match="another process answers"):
        await second.start(address)
    transport = httpx2.AsyncHTTPTransport(uds=str(path))
    async with httpx2.AsyncClient(transport=transport) as client:
        assert (await client.get("http://agent/a")).status_code == 200
    await first.aclose()
    assert not path.exists()
    await refuse_live_socket(str(path))


async def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    assert path.exists()
    again = HttpServer(echo)
    await again.start(UnixAddress(str(path)))
    await again.aclose()


async def test_tls() -> None:
    issued = Kms.create().issue(AppId("aa" * 20))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.load_into(context)
    server = HttpServer(echo, tls=context)
    address = await server.start(TcpAddress("127.0.0.1", 0))
    async with httpx2.AsyncClient(verify=False) as client:
        assert (await client.get(f"https://{address}/a")).status_code == 200
    await server.aclose()


async def test_drop_connections_cuts_and_the_server_goes_on() -> None:
    server = HttpServer(echo)
    address = await server.start_tcp()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    server.drop_connections()
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            await reader.read()
    writer.close()
    async with httpx2.AsyncClient() as client:
        assert (await client.get(f"http://{address}/a")).status_code == 200
    assert server.connections == 2
    await server.aclose()

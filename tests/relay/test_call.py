"""One call: whole answers in every framing, and every way in which there is none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from dstack_mesh.model import TcpAddress
from dstack_mesh.relay.call import CallError, call


@contextlib.asynccontextmanager
async def server(
    answer: bytes, *, reset: bool = False
) -> AsyncIterator[tuple[TcpAddress, list[bytes]]]:
    """Serve `answer` to each request, then close; give the address and the requests seen."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        seen.append(head + await reader.readexactly(length))
        writer.write(answer)
        if reset:
            await writer.drain()
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield TcpAddress(*listening.sockets[0].getsockname()), seen


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nok",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=["length", "chunked", "until the end", "behind an interim one"],
)
async def test_a_whole_answer(answer: bytes) -> None:
    async with server(answer) as (address, seen):
        got = await call(address, "POST", "/X?y", host="h", body=b"{}", limit=1000)
    assert got == (200, b"ok")
    assert seen[0].startswith(b"POST /X?y HTTP/1.1\r\nHost: h\r\n")
    assert seen[0].endswith(b"\r\n\r\n{}")


async def test_an_error_status_is_an_answer() -> None:
    async with server(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno") as (address, _):
        assert await call(address, "GET", "/", host="h", limit=1000) == (400, b"no")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "ended before the answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "ended before the answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", "ended before the answer was complete"),
        (b"SSH-2.0-x\r\n", "not HTTP/1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2000, "larger than 1000 bytes"),
    ],
)
async def test_what_is_no_answer(answer: bytes, says: str) -> None:
    async with server(answer) as (address, _):
        with pytest.raises(CallError, match=says):
            await call(address, "GET", "/", host="h", limit=1000)


async def test_a_reset_does_not_end_an_answer_that_only_its_connection_ends() -> None:
    async with server(b"HTTP/1.0 200 OK\r\n\r\nok", reset=True) as (address, _):
        with pytest.raises(CallError, match="ended before"):
            await call(address, "GET", "/", host="h", limit=1000)


async def test_no_connection_is_an_os_error() -> None:
    async with server(b"") as (address, _):
        pass
    with pytest.raises(OSError, match="111"):
        await call(address, "GET", "/", host="h", limit=1000)

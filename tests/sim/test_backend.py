"""The backend that demo and tests call."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING

import httpx2
import pytest
import websockets

from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Answer, Request, Response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[tuple[Backend, httpx2.AsyncClient]]:
    backend = Backend("one")
    address = await backend.start()
    async with httpx2.AsyncClient(base_url=f"http://{address}") as client:
        yield backend, client
    await backend.aclose()


async def raw(client: httpx2.AsyncClient, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(request)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_hello_and_its_name() -> None:
    async with running() as (backend, client):
        answer = await client.get("/")
        assert answer.text == "hello\n"
        assert answer.headers["x-backend"] == "one"
        assert (await client.get("/nope")).status_code == 404
        assert [request.path for request in backend.requests] == ["/", "/nope"]
        assert backend.connections == 1


async def test_echo_tells_everything_in_order() -> None:
    async with running() as (_, client):
        headers = [("X-B", "2"), ("x-a", "1"), ("X-B", "3")]
        told = (await client.post("/echo?x=%2f", headers=headers, content=b"body")).json()
    assert (told["method"], told["target"], told["version"]) == ("POST", "/echo?x=%2f", "1.1")
    own = [pair for pair in told["headers"] if pair[0].lower().startswith("x-")]
    assert own == [["X-B", "2"], ["x-a", "1"], ["X-B", "3"]]
    assert told["body_bytes"] == 4
    assert told["body_sha256"] == hashlib.sha256(b"body").hexdigest()


async def test_upload_counts_a_stream() -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(65_536)

    async with running() as (_, client):
        told = (await client.put("/upload", content=body())).json()
    assert told["bytes"] == 64 * 65_536
    assert told["sha256"] == hashlib.sha256(bytes(64 * 65_536)).hexdigest()


@pytest.mark.parametrize("path", ["/download", "/download-chunked", "/download-close"])
async def test_downloads_have_the_size_asked_for(path: str) -> None:
    async with running() as (_, client):
        for size in (0, 1, 100_000):
            answer = await client.get(f"{path}?bytes={size}")
            assert len(answer.content) == size
    assert ("content-length" in answer.headers) == (path == "/download")


async def test_chunked_download_ends_with_its_digest() -> None:
    async with running() as (_, client):
        request = b"GET /download-chunked?bytes=3 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        answer = await raw(client, request)
    digest = hashlib.sha256(b"\x00\x01\x02").hexdigest().encode()
    assert answer.endswith(b"0\r\nx-sha256: " + digest + b"\r\n\r\n")


async def test_cut_breaks_off() -> None:
    async with running() as (_, client):
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get("/cut?bytes=10")


async def test_events_come_one_by_one() -> None:
    async with running() as (_, client), client.stream("GET", "/events?n=2&seconds=0.01") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        found = [line async for line in answer.aiter_lines()]
    assert found == ["id: 1", "data: event 1 of 2", "", "id: 2", "data: event 2 of 2", ""]


@pytest.mark.parametrize("status", [200, 204, 304, 404, 503])
async def test_status(status: int) -> None:
    async with running() as (_, client):
        answer = await client.get(f"/status/{status}")
    assert answer.status_code == status
    assert answer.text == ("" if status in {204, 304} else f"status {status}\n")


async def test_status_that_is_none() -> None:
    async with running() as (_, client):
        assert (await client.get("/status/99")).status_code == 400


async def test_mirror_streams_back() -> None:
    async with running() as (_, client):
        assert (await client.post("/mirror", content=b"x" * 500_000)).content == b"x" * 500_000


async def test_slow_early_hints_and_cookies() -> None:
    async with running() as (_, client):
        assert (await client.get("/slow?seconds=0.01")).text == "hello\n"
        hints = await raw(
            client, b"GET /early-hints HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        cookies = await client.get("/cookies")
    assert hints.startswith(b"HTTP/1.1 103 ")
    assert cookies.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert (b"x-text", b"caf\xe9") in cookies.headers.raw


async def test_web_socket() -> None:
    async with running() as (_, client):
        url = f"ws://{client.base_url.host}:{client.base_url.port}/ws"
        async with websockets.connect(url, proxy=None) as socket:
            for message in ("hello", b"\x00" * 70_000):
                await socket.send(message)
                assert await socket.recv() == message
            await (await socket.ping())


async def test_web_socket_that_breaks_the_protocol_is_closed() -> None:
    async with running() as (_, client):
        answer = await raw(
            client,
            b"GET /ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
            b"\x81\x05Hello",
        )
    head, _, frame = answer.partition(b"\r\n\r\n")
    assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
    assert frame[0] == 0x88
    assert frame[2:4] == (1002).to_bytes(2, "big")


async def test_bare_echo_and_no_upgrade() -> None:
    async with running() as (_, client):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b"GET /ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            writer.write(b"\x00bytes")
            assert await reader.readexactly(6) == b"\x00bytes"
            writer.write_eof()
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert (await client.get("/ws")).status_code == 426


async def test_faults_and_answers_of_its_own(tmp_path: Path) -> None:
    async def teapot(_: Request) -> Answer:
        return Response(418)

    async with running() as (backend, client):
        backend.on("/tea", teapot)
        assert (await client.get("/tea")).status_code == 418
        backend.fail_next()
        assert (await client.get("/")).status_code == 500
        assert (await client.get("/")).status_code == 200
        address = await backend.start(UnixAddress(str(tmp_path / "backend.sock")))
        assert str(address).endswith("backend.sock")


async def test_it_may_be_stopped_and_started_again_on_its_port() -> None:
    async with running() as (backend, client):
        address = TcpAddress(client.base_url.host, client.base_url.port or 0)
        await backend.aclose()
        with pytest.raises(httpx2.ConnectError):
            await client.get("/")
        await backend.start(address)
        assert (await client.get("/")).status_code == 200

"""Held against the simulator's backend, which is another HTTP implementation than the sidecar's."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator

import pytest

from dstack_mesh.demo import client
from dstack_mesh.demo.client import Answer, ClientError
from dstack_mesh.sim.backend import Backend


@pytest.fixture
async def backend() -> AsyncIterator[tuple[Backend, str]]:
    one = Backend()
    address = await one.start()
    yield one, str(address)
    await one.aclose()


async def test_get_reads_the_whole_answer(backend: tuple[Backend, str]) -> None:
    answer = await client.get(backend[1], "/echo?x=1", {"x-own": "1"})
    assert answer.status == 200
    assert answer.field("target") == "/echo?x=1"
    assert ["x-own", "1"] in answer.json()["headers"]


async def test_post_sends_its_body_in_pieces(backend: tuple[Backend, str]) -> None:
    pieces = [bytes([n]) * 70_000 for n in range(20)]
    answer = await client.post(backend[1], "/upload", {}, iter(pieces), 1_400_000)
    assert answer.field("bytes") == "1400000"
    assert answer.field("sha256") == hashlib.sha256(b"".join(pieces)).hexdigest()


async def test_lines_arrive_one_by_one(backend: tuple[Backend, str]) -> None:
    lines = [line async for line in client.lines(backend[1], "/events?n=2", {})]
    assert lines == ["id: 1", "data: event 1 of 2", "", "id: 2", "data: event 2 of 2", ""]


async def test_lines_of_an_error_are_none(backend: tuple[Backend, str]) -> None:
    with pytest.raises(ClientError, match="the answer was 404"):
        [line async for line in client.lines(backend[1], "/nowhere", {})]


async def test_broken_answer_is_an_error(backend: tuple[Backend, str]) -> None:
    with pytest.raises(ClientError, match="no whole answer: "):
        await client.get(backend[1], "/cut?bytes=10")
    backend[0].nonsense = b""
    with pytest.raises(ClientError):
        await client.get(backend[1], "/")


async def test_nobody_there_is_an_error(backend: tuple[Backend, str]) -> None:
    await backend[0].aclose()
    with pytest.raises(ConnectionRefusedError):
        await client.get(backend[1], "/")


async def test_silence_is_an_error(
    backend: tuple[Backend, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.05)
    with pytest.raises(ClientError, match=r"nothing for 0\.05 s"):
        await client.get(backend[1], "/slow?seconds=30")


async def test_answer_before_the_bodys_end_is_read() -> None:
    served = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden\r\nx-dstack-mesh-error: policy_denied\r\n")
        writer.write(b"content-length: 2\r\n\r\n[]")
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        served.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        body = (b"x" * 65536 for _ in range(1000))
        answer = await client.post(f"127.0.0.1:{port}", "/", {}, body, 1000 * 65536)
        await asyncio.wait_for(served.wait(), 10)
    assert str(answer) == "403 policy_denied"


def test_fields_of_what_is_no_object_are_empty() -> None:
    assert Answer(200, "", b"[]").field("x") == ""
    assert Answer(200, "", b"hello").field("x") == ""
    assert Answer(200, "", b'{"x": 1}').field("x") == "1"
    assert str(Answer(200, "", b"")) == "200"

from __future__ import annotations

import asyncio

import pytest
from bench.sink import Sink


@pytest.mark.parametrize("size", [0, 1, 300_000])
async def test_the_length_is_told_when_all_of_it_is_there(size: int) -> None:
    answers = await exchange(
        b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + bytes(size), times=2
    )

    assert answers == [str(size).encode()] * 2


async def test_a_chunked_body_ends_with_its_last_chunk() -> None:
    body = b"10\r\n" + bytes(16) + b"\r\n0\r\n\r\n"

    (answer,) = await exchange(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + body)

    assert answer == str(len(body)).encode()


async def test_there_is_no_answer_before_the_end() -> None:
    request = b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\n123456789"

    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(exchange(request), 0.1)


async def exchange(request: bytes, times: int = 1) -> list[bytes]:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        answers = []
        for _ in range(times):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
            answers.append(await reader.readexactly(length))
        return answers
    finally:
        writer.close()
        server.close()

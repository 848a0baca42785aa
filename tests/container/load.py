"""A steady load of plain HTTP clients that keep their connections, counting every failure."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field


@dataclass
class Load:
    """What became of a load."""

    requests: int = 0
    failures: list[str] = field(default_factory=list)
    """Answers that were not 200, and connections that ended."""


async def load(
    host: str, port: int, target_app: str, *, clients: int, until: asyncio.Event
) -> Load:
    """Send GET and POST in turn on `clients` connections, each answer before the next request.

    A connection that ends is a failure: the mesh has no reason to close one.
    """
    told = Load()
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(_client(host, port, target_app, number, told, until))
    return told


async def _client(
    host: str, port: int, target_app: str, number: int, told: Load, until: asyncio.Event
) -> None:
    head = f"HTTP/1.1\r\nHost: billing\r\nx-dstack-target-app: {target_app}\r\n"
    get = f"GET / {head}\r\n".encode()
    post = f"POST /upload {head}Content-Length: 2000\r\n\r\n".encode() + bytes(2000)
    reader = writer = None
    turn = number
    while not until.is_set():
        try:
            if reader is None or writer is None:
                reader, writer = await asyncio.open_connection(host, port)
            turn += 1
            writer.write(post if turn % 2 else get)
            async with asyncio.timeout(30):
                status = await _answer(reader)
            told.requests += 1
            if status != 200:
                told.failures.append(f"status {status}")
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            told.failures.append(f"{type(error).__name__}: {error}")
            reader = writer = None
            await asyncio.sleep(0.1)
    if writer is not None:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> int:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    _, _, rest = head.partition(b"content-length:")
    await reader.readexactly(int(rest.split(b"\r\n")[0]))
    return int(head.split()[1])

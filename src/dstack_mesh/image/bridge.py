"""A bridge to a guest agent's socket that only its owner may open.

`python -m dstack_mesh.image.bridge FROM TO` listens on the unix socket FROM (mode 0660, its
directory decides who reaches it) and passes the bytes of each connection on to TO. It runs as the
owner of TO without any capability, so that the mesh, which talks to the world, need not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

_READ_SIZE = 64 * 1024


class Bridge:
    """Listens on one socket, connects to another."""

    def __init__(self, listen: str, target: str) -> None:
        self._listen = listen
        self._target = target

    async def start(self) -> asyncio.Server:
        """Listen. Raises OSError."""
        before = os.umask(0o117)
        try:
            return await asyncio.start_unix_server(self._accept, self._listen, limit=_READ_SIZE)
        finally:
            os.umask(before)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # The target anew each time: an agent that was started again has a new socket.
            other = await asyncio.open_unix_connection(self._target, limit=_READ_SIZE)
        except OSError as error:
            _say(f"the guest agent at {self._target} does not answer: {error.strerror}")
            await _close(writer)
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, other[1]))
                group.create_task(_pump(other[0], writer))
        except* OSError:  # cut: so is the other side
            writer.transport.abort()
            other[1].transport.abort()
        finally:
            await _close(other[1])
            await _close(writer)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_READ_SIZE):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _say(line: str) -> None:
    print(f"dstack-mesh bridge: {line}", file=sys.stderr, flush=True)  # noqa: T201 - its only log


async def _main(listen: str, target: str) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await Bridge(listen, target).start()
    await stopped.wait()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))

"""A plain relay between a mesh and its peer: it hands on all bytes and remembers the mesh's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from dstack_mesh.model import TcpAddress
from tests.integration.harness import Wire, origin


class Link:
    """One connection of the mesh, and the one to the peer that was opened for it."""

    def __init__(self) -> None:
        self.sent = bytearray()
        """What the mesh sent."""
        self.port = 0
        """By which the peer knows the connection; 0: the mesh sent nothing, there is none."""
        self.over = asyncio.Event()
        """Set once the peer has ended its connection: it has taken down all it ever will."""


class Tap:
    """Listens for the mesh. The peer hears of a connection with its first byte."""

    def __init__(self, peer: TcpAddress) -> None:
        self._peer = peer
        self.links: list[Link] = []
        self.address: TcpAddress

    def forget_what_is_over(self) -> None:
        """Keep only links on which something may still come."""
        self.links = [link for link in self.links if not link.over.is_set()]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Tap]:
        """Relay for the block."""
        async with origin(self._serve) as (_, self.address):
            yield self

    async def _serve(self, mesh: Wire) -> None:
        link = Link()
        self.links.append(link)
        data = await mesh.read()
        if not data:
            link.over.set()
            return
        reader, writer = await asyncio.open_connection(self._peer.host, self._peer.port)
        link.port = writer.get_extra_info("sockname")[1]
        peer = Wire(reader, writer)
        down = asyncio.ensure_future(_pump_down(peer, mesh, link))
        try:
            while data:
                link.sent += data
                await peer.send(data)
                data = await mesh.read()
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()
            await down
        finally:
            down.cancel()
            writer.close()


async def _pump_down(peer: Wire, mesh: Wire, link: Link) -> None:
    while data := await peer.read():
        await mesh.send(data)
    link.over.set()
    mesh.finish()

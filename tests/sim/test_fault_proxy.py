"""The proxy does what it says, seen from both sides by plain sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.harness import Wire, origin

from dstack_mesh.model import Address, UnixAddress
from dstack_mesh.sim.fault_proxy import Fault, FaultProxy

SECONDS = 10


@dataclass
class Site:
    proxy: FaultProxy
    address: Address
    accepted: asyncio.Queue[Wire]

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[Wire, Wire]]:
        """Connect by way of the proxy; give both ends."""
        if isinstance(self.address, UnixAddress):
            reader, writer = await asyncio.open_unix_connection(self.address.path)
        else:
            reader, writer = await asyncio.open_connection(self.address.host, self.address.port)
        try:
            async with asyncio.timeout(SECONDS):
                yield Wire(reader, writer), await self.accepted.get()
        finally:
            writer.transport.abort()


@pytest.fixture(params=["tcp", "unix"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    accepted: asyncio.Queue[Wire] = asyncio.Queue()

    async def serve(wire: Wire) -> None:
        accepted.put_nowait(wire)
        await asyncio.Event().wait()

    async with origin(serve) as (_, target):
        proxy = FaultProxy(target)
        where = UnixAddress(str(tmp_path / "s")) if request.param == "unix" else None
        site = Site(proxy, await proxy.start(where), accepted)
        try:
            yield site
        finally:
            await proxy.aclose()


async def exactly(wire: Wire, data: bytes) -> None:
    got = b""
    while len(got) < len(data):
        piece = await wire.read()
        assert piece, f"ended after {got!r}"
        got += piece
    assert got == data


async def nothing_comes(wire: Wire) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wire.read(), 0.1)


async def test_without_a_fault_all_goes_through(site: Site) -> None:
    async with site.connection() as (client, target):
        big = bytes(range(256)) * 4000
        sending = asyncio.create_task(client.send(big))
        await exactly(target, big)
        await sending
        await target.send(b"answer")
        await exactly(client, b"answer")
        client._writer.write_eof()
        assert await target.read() == b""
        await target.send(b"after the end of the other way")
        await exactly(client, b"after the end of the other way")
        target.finish()
        assert await client.read() == b""
    assert site.proxy.connections == 1


async def test_delay(site: Site) -> None:
    site.proxy.fault = Fault("delay", at=2, seconds=0.3)
    async with site.connection() as (client, target):
        began = time.monotonic()
        await target.send(b"abcd")
        await exactly(client, b"ab")
        await exactly(client, b"cd")
        assert time.monotonic() - began >= 0.29
        await client.send(b"up")
        await exactly(target, b"up")


async def test_drip(site: Site) -> None:
    site.proxy.fault = Fault("drip", "up", at=1, seconds=0.05)
    async with site.connection() as (client, target):
        began = time.monotonic()
        await client.send(b"abcd")
        pieces = [await target.read() for _ in range(4)]
        assert pieces == [b"a", b"b", b"c", b"d"]
        assert time.monotonic() - began >= 0.09


@pytest.mark.parametrize("way", ["up", "down"])
async def test_reset(site: Site, way: str) -> None:
    site.proxy.fault = Fault("reset", way, at=3)  # type: ignore[arg-type]
    async with site.connection() as (client, target):
        sender, receiver = (client, target) if way == "up" else (target, client)
        await sender.send(b"abcdef")
        await receiver.to_end()
        assert b"abc".startswith(receiver.received)
        await sender.to_end()


async def test_a_reset_is_one(site: Site) -> None:
    if isinstance(site.address, UnixAddress):
        pytest.skip("a unix socket knows no reset")
    site.proxy.fault = Fault("reset")
    where = site.address.host, site.address.port
    with socket.create_connection(where, SECONDS) as sock, pytest.raises(ConnectionResetError):
        await asyncio.to_thread(sock.recv, 1)


@pytest.mark.parametrize("at", [0, 3])
async def test_half_close(site: Site, at: int) -> None:
    site.proxy.fault = Fault("half-close", "down", at=at)
    async with site.connection() as (client, target):
        await target.send(b"abcdef")
        await client.to_end()
        assert client.received == b"abc"[:at]
        await client.send(b"still goes")
        await exactly(target, b"still goes")


@pytest.mark.parametrize("at", [0, 3])
async def test_blackhole(site: Site, at: int) -> None:
    site.proxy.fault = Fault("blackhole", "up", at=at)
    async with site.connection() as (client, target):
        await client.send(b"abcdef")
        if at:
            await exactly(target, b"abc")
        await target.send(b"back")
        await exactly(client, b"back")
        client._writer.write_eof()
        await nothing_comes(target)


async def test_garbage(site: Site) -> None:
    site.proxy.fault = Fault("garbage", at=3, content=b"??")
    async with site.connection() as (client, target):
        await target.send(b"abcdef")
        await exactly(client, b"abc??def")


@pytest.mark.parametrize("at", [0, 3])
async def test_truncate(site: Site, at: int) -> None:
    site.proxy.fault = Fault("truncate", "down", at=at)
    async with site.connection() as (client, target):
        await target.send(b"abcdef")
        await client.to_end()
        assert client.received == b"abc"[:at]
        await target.to_end()
        assert target.received == b""


async def test_the_next_ones_only(site: Site) -> None:
    site.proxy.fault_next(Fault("garbage", content=b"1"), Fault("garbage", content=b"2"))
    for expected in (b"1!", b"2!", b"!"):
        async with site.connection() as (client, target):
            await target.send(b"!")
            await exactly(client, expected)


async def test_a_strike_counts_from_then(site: Site) -> None:
    async with site.connection() as (client, target):
        await target.send(b"before")
        await exactly(client, b"before")
        site.proxy.strike(Fault("garbage", at=2, content=b"?"))
        await target.send(b"after")
        await exactly(client, b"af?ter")
        site.proxy.strike(Fault("truncate"))
        assert await client.read() == b""


async def test_a_target_that_is_not_there(site: Site, tmp_path: Path) -> None:
    site.proxy.target = UnixAddress(str(tmp_path / "none"))
    if isinstance(site.address, UnixAddress):
        reader, writer = await asyncio.open_unix_connection(site.address.path)
    else:
        reader, writer = await asyncio.open_connection(site.address.host, site.address.port)
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""
    writer.transport.abort()

"""The gateway, with real TLS through it end to end, and bytes counted where it matters."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from typing import TYPE_CHECKING

import httpx2
import pytest

from dstack_mesh.model import AppId, InstanceId
from dstack_mesh.sim.gateway import Gateway
from dstack_mesh.sim.kms import Kms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

APP = AppId("aa" * 20)
INSTANCE = InstanceId("cc" * 20)
DOMAIN = "sim.dstack.test"
KMS = Kms.create(b"gateway tests")


class Target:
    """A TLS server that says its name and what it was sent, once the client has finished."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host = f"127.9.9.{name}"
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        KMS.issue(APP).load_into(context)
        self._server = await asyncio.start_server(self._serve, self.host, port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            while line := await reader.readline():
                count, _, _ = line.partition(b"\n")
                body = await reader.readexactly(int(count))
                digest = hashlib.sha256(body).hexdigest()
                writer.write(f"{self.name} {digest}\n".encode() + body)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=KMS.root_pem.decode())
    return context


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(gateway: Gateway, name: str | None) -> Stream:
    async with asyncio.timeout(5):
        return await asyncio.open_connection(
            gateway.address.host,
            gateway.address.port,
            ssl=client_context(),
            server_hostname=name or "",
        )


async def ask(stream: Stream, body: bytes = b"hi") -> str:
    """Send a body; the name of the target that got it whole and sent it back whole."""
    reader, writer = stream
    async with asyncio.timeout(20):
        writer.write(f"{len(body)}\n".encode() + body)
        name, digest = (await reader.readline()).decode().split()
        assert digest == hashlib.sha256(body).hexdigest()
        assert await reader.readexactly(len(body)) == body
    return name


async def end(stream: Stream) -> None:
    stream[1].close()
    with contextlib.suppress(OSError):
        await stream[1].wait_closed()


@contextlib.asynccontextmanager
async def world(*names: str) -> AsyncIterator[tuple[Gateway, list[Target]]]:
    gateway = Gateway(DOMAIN)
    await gateway.start()
    targets = [Target(name) for name in names]
    port = 0
    try:
        for target in targets:
            await target.start(port)
            port = target.port
            gateway.add_route(APP, target.host)
        yield gateway, targets
    finally:
        await gateway.aclose()
        for target in targets:
            await target.aclose()


def name_of(identifier: str, target: Target) -> str:
    return f"{identifier}-{target.port}s.{DOMAIN}"


async def test_tls_goes_through_unopened() -> None:
    async with world("1") as (gateway, [target]):
        gateway.add_route(INSTANCE, target.host)
        for identifier in (APP, INSTANCE, APP.upper()):
            stream = await connect(gateway, name_of(identifier, target))
            shown = stream[1].get_extra_info("ssl_object").getpeercert(binary_form=True)
            assert APP.encode().hex() not in shown.hex()
            assert bytes.fromhex("0414" + APP) in shown
            assert await ask(stream) == "1"
            await end(stream)
        assert gateway.connections[name_of(APP, target)] == 2


async def test_large_bodies_both_ways_at_once() -> None:
    body = bytes(range(256)) * 32_768
    async with world("1") as (gateway, [target]):
        streams = [await connect(gateway, name_of(APP, target)) for _ in range(2)]
        assert await asyncio.gather(*(ask(stream, body) for stream in streams)) == ["1", "1"]
        for stream in streams:
            await end(stream)


async def test_instances_take_turns_and_a_dead_one_is_passed_over() -> None:
    async with world("1", "2", "3") as (gateway, targets):
        found = []
        for number in range(8):
            if number == 6:
                await targets[1].aclose()
            stream = await connect(gateway, name_of(APP, targets[0]))
            found.append(await ask(stream))
            await end(stream)
    assert found == ["1", "2", "3", "1", "2", "3", "1", "3"]


async def test_routes_come_and_go() -> None:
    async with world("1", "2") as (gateway, targets):
        gateway.remove_route(APP, targets[0].host)
        for _ in range(2):
            stream = await connect(gateway, name_of(APP, targets[0]))
            assert await ask(stream) == "2"
            await end(stream)
        gateway.remove_route(APP)
        gateway.remove_route(APP, "no.such.host")
        with pytest.raises((OSError, EOFError)):
            await connect(gateway, name_of(APP, targets[0]))


async def test_port_of_a_route_wins_over_the_name() -> None:
    async with world("1") as (gateway, [target]):
        gateway.add_route(INSTANCE, target.host, target.port)
        stream = await connect(gateway, f"{INSTANCE}-1s.{DOMAIN}")
        assert await ask(stream) == "1"
        await end(stream)


@pytest.mark.parametrize(
    "name",
    [
        "bb" * 20 + "-{port}s." + DOMAIN,
        APP + "-{port}." + DOMAIN,
        APP + "-{port}g." + DOMAIN,
        APP + "s." + DOMAIN,
        APP + "-0{port}s." + DOMAIN,
        APP + "-99999s." + DOMAIN,
        APP + "-{port}s.other.test",
        APP + "-{port}s.x." + DOMAIN,
        APP + "-1s." + DOMAIN,
        None,
    ],
)
async def test_what_it_cannot_route_it_closes_during_the_handshake(name: str | None) -> None:
    async with world("1") as (gateway, [target]):
        asked = name.format(port=target.port) if name else None
        with pytest.raises((OSError, EOFError)):
            await connect(gateway, asked)


async def test_what_is_not_tls_is_closed() -> None:
    async with world("1") as (gateway, _):
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"):
            address = gateway.address
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            await end((reader, writer))


async def test_hello_in_small_pieces_is_put_together() -> None:
    async with world("1") as (gateway, [target]):
        address = gateway.address
        reader, writer = await asyncio.open_connection(address.host, address.port)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context().wrap_bio(incoming, outgoing, server_hostname=name_of(APP, target))
        done = False
        async with asyncio.timeout(10):
            while not done:
                try:
                    tls.do_handshake()
                    done = True
                except ssl.SSLWantReadError:
                    for byte in outgoing.read():
                        writer.write(bytes((byte,)))
                        await writer.drain()
                    incoming.write(await reader.read(65_536))
        assert tls.version() == "TLSv1.3"
        await end((reader, writer))


async def test_half_close_passes_through_and_the_answer_comes_back() -> None:
    """With bare TCP behind it: a client that has sent its end still gets the answer."""
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())
        writer.write(b"answer after the end")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    gateway = Gateway(DOMAIN)
    await gateway.start()
    gateway.add_route(APP, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    outgoing = ssl.MemoryBIO()
    tls = client_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname=f"{APP}-{port}s.{DOMAIN}"
    )
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    reader, writer = await asyncio.open_connection(gateway.address.host, gateway.address.port)
    writer.write(hello + b"more")
    writer.write_eof()
    async with asyncio.timeout(5):
        assert await reader.read() == b"answer after the end"
    assert received == [hello + b"more"]
    await end((reader, writer))
    await gateway.aclose()
    server.close()


async def test_backpressure_reaches_the_sender() -> None:
    """A target that does not read stops the sender before memory fills."""
    never = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await never.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
    gateway = Gateway(DOMAIN)
    await gateway.start()
    gateway.add_route(APP, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    outgoing = ssl.MemoryBIO()
    tls = client_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname=f"{APP}-{port}s.{DOMAIN}"
    )
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    reader, writer = await asyncio.open_connection(gateway.address.host, gateway.address.port)
    writer.write(outgoing.read())
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 256 * 2**20:
            writer.write(bytes(2**20))
            sent += 2**20
            async with asyncio.timeout(0.5):
                await writer.drain()
    assert sent < 64 * 2**20
    writer.transport.abort()
    never.set()
    await end((reader, writer))
    await gateway.aclose()
    server.close()


async def test_drop_connections_cuts_both_ends() -> None:
    async with world("1") as (gateway, [target]):
        stream = await connect(gateway, name_of(APP, target))
        await ask(stream)
        gateway.drop_connections()
        async with asyncio.timeout(5):
            with contextlib.suppress(OSError):
                assert await stream[0].read() == b""
        await end(stream)
        stream = await connect(gateway, name_of(APP, target))
        assert await ask(stream) == "1"
        await end(stream)


async def test_stop_and_resume_accepting_on_the_same_port() -> None:
    async with world("1") as (gateway, [target]):
        address = gateway.address
        kept = await connect(gateway, name_of(APP, target))
        await gateway.stop_accepting()
        with pytest.raises(ConnectionRefusedError):
            await connect(gateway, name_of(APP, target))
        assert await ask(kept) == "1"
        await end(kept)
        await gateway.resume_accepting()
        assert gateway.address == address
        stream = await connect(gateway, name_of(APP, target))
        assert await ask(stream) == "1"
        await end(stream)


async def test_info_over_its_own_tls() -> None:
    async with world() as (gateway, _), httpx2.AsyncClient(verify=False) as client:
        answer = await client.get(f"{gateway.info_url}/prpc/Info")
        assert answer.json() == {
            "base_domain": DOMAIN,
            "external_port": gateway.address.port,
            "app_address_ns_prefix": "",
            "version": "simulated",
        }
        assert (await client.get(f"{gateway.info_url}/other")).status_code == 404
        gateway.info.fail_next()
        assert (await client.get(f"{gateway.info_url}/prpc/Info")).status_code == 500
        assert gateway.info.requests == 3


async def test_info_certificate_is_not_verifiable() -> None:
    async with world() as (gateway, _), httpx2.AsyncClient() as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get(f"{gateway.info_url}/prpc/Info")

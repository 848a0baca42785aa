from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from dstack_mesh.errors import (
    AgentUnavailable,
    ConnectFailed,
    ConnectTimeout,
    MeshError,
    UpstreamClosed,
)
from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.dial import PlainConnector, authority, open_socket, reason
from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.relay.worker import Worker


@asynccontextmanager
async def listening(host: str = "127.0.0.1") -> AsyncIterator[TcpAddress]:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await _.read()
        writer.close()

    server = await asyncio.start_server(serve, host, 0)
    async with server:
        name = server.sockets[0].getsockname()
        yield TcpAddress(name[0], name[1])


@asynccontextmanager
async def lane(connector: PlainConnector) -> AsyncIterator[Lane]:
    worker = Worker(asyncio.get_running_loop(), Timeouts())
    try:
        yield Lane(worker, connector)
    finally:
        worker.close()
        await asyncio.sleep(0.01)


def unused() -> TcpAddress:
    """Give an address on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return TcpAddress("127.0.0.1", sock.getsockname()[1])


async def test_a_tcp_connection_sends_small_writes_at_once_and_is_watched() -> None:
    async with listening() as address:
        sock = await open_socket(asyncio.get_running_loop(), address)
        with sock:
            assert sock.getpeername() == ("127.0.0.1", address.port)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            assert sock.gettimeout() == 0


async def test_a_name_is_resolved_and_every_address_of_it_tried() -> None:
    async with listening() as address:
        loop = asyncio.get_running_loop()

        class Resolving:
            sock_connect = loop.sock_connect

            async def getaddrinfo(self, host: str, port: int, **_: object) -> list[object]:
                assert host == "name.test"
                dead = unused()
                return [
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", (dead.host, dead.port)),
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address.host, port)),
                ]

        with await open_socket(Resolving(), TcpAddress("name.test", address.port)) as sock:  # type: ignore[arg-type]
            assert sock.getpeername()[1] == address.port


async def test_a_name_without_an_address() -> None:
    class Resolving:
        async def getaddrinfo(self, *_: object, **__: object) -> list[object]:
            return []

    with pytest.raises(OSError, match=r"name\.test has no address"):
        await open_socket(Resolving(), TcpAddress("name.test", 1))  # type: ignore[arg-type]


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = await asyncio.start_unix_server(lambda _, writer: writer.close(), path)
    async with server:
        with await open_socket(asyncio.get_running_loop(), UnixAddress(path)) as sock:
            assert sock.getpeername() == path


async def test_a_connection_that_is_given_up_leaves_no_socket() -> None:
    made: list[socket.socket] = []
    begun = asyncio.Event()

    class Never:
        async def sock_connect(self, sock: socket.socket, _: object) -> None:
            made.append(sock)
            begun.set()
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(open_socket(Never(), UnixAddress("/x")))  # type: ignore[arg-type]
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made[0].fileno() == -1


async def test_a_connection_is_ready_for_requests() -> None:
    async with listening() as address:
        connector = PlainConnector(address, 5, "the backend")
        async with lane(connector) as one:
            upstream = await connector.connect(one)
            assert isinstance(upstream, Upstream)
            assert (upstream.peer, upstream.generation) == (None, connector.generation())
            assert one.worker.upstreams == {upstream}
            assert upstream.usable(one.worker.clock(), connector.generation())


FAILED = "the backend at 127.0.0.1:%d: Connection refused"


@pytest.mark.parametrize(
    ("unavailable", "kind"), [(None, ConnectFailed), (AgentUnavailable, AgentUnavailable)]
)
async def test_nobody_there(unavailable: type[MeshError] | None, kind: type[MeshError]) -> None:
    address = unused()
    connector = PlainConnector(address, 5, "the backend", unavailable)
    async with lane(connector) as one:
        with pytest.raises(kind) as caught:
            await connector.connect(one)
        assert caught.value.detail == FAILED % address.port
        assert one.worker.upstreams == set()


async def test_no_such_unix_socket(tmp_path: Path) -> None:
    connector = PlainConnector(UnixAddress(str(tmp_path / "s")), 5, "the guest agent")
    async with lane(connector) as one:
        with pytest.raises(ConnectFailed, match="No such file or directory"):
            await connector.connect(one)


@pytest.mark.parametrize(
    ("unavailable", "kind"), [(None, ConnectTimeout), (AgentUnavailable, AgentUnavailable)]
)
async def test_nobody_accepts(unavailable: type[MeshError] | None, kind: type[MeshError]) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        host, port = full.getsockname()
        queued = [socket.socket() for _ in range(8)]  # more than the backlog takes
        for sock in queued:
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect((host, port))
        connector = PlainConnector(TcpAddress(host, port), 0.05, "the backend", unavailable)
        async with lane(connector) as one:
            with pytest.raises(kind, match=r"within 0\.05 s \(MESH_CONNECT_TIMEOUT\)"):
                await connector.connect(one)
        for sock in queued:
            sock.close()


@pytest.mark.parametrize(
    ("unavailable", "kind"), [(None, UpstreamClosed), (AgentUnavailable, AgentUnavailable)]
)
def test_a_connection_lost(unavailable: type[MeshError] | None, kind: type[MeshError]) -> None:
    connector = PlainConnector(TcpAddress("h", 1), 5, "the backend", unavailable)
    orderly = connector.lost(None)
    assert isinstance(orderly, kind)
    assert orderly.detail == "the backend at h:1 closed the connection before answering"
    reset = connector.lost(ConnectionResetError(104, "Connection reset by peer"))
    assert reset.detail == f"{orderly.detail} (Connection reset by peer)"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (socket.gaierror(-2, "unknown"), "the name does not resolve (unknown)"),
        (OSError(113, "No route to host"), "No route to host"),
        (
            OSError(24, "x"),
            "Too many open files: this process may open no more; raise the limit (ulimit -n)",
        ),
        (OSError("x.test has no address"), "x.test has no address"),
        (OSError(), "OSError"),
        (ValueError("bad"), "bad"),
        (EOFError(), "EOFError"),
    ],
)
def test_reasons_are_for_a_reader(error: BaseException, text: str) -> None:
    assert reason(error) == text


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (TcpAddress("a", 80), b"a:80"),
        (TcpAddress("::1", 80), b"[::1]:80"),
        (UnixAddress("/s"), b"localhost"),
    ],
)
def test_the_host_of_a_request_that_came_without(address: Address, host: bytes) -> None:
    assert authority(address) == host

"""A whole mesh in one event loop: a simulated world, real sidecars, and a plain client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import h11

from dstack_mesh.model import Address, AppId, TcpAddress
from dstack_mesh.settings.load import load_settings
from dstack_mesh.sidecar import Sidecar
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.world import SimApp, World


@dataclass
class Answer:
    """A response as an independent strict reader (h11) understood it."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    interim: list[int] = field(default_factory=list)
    http_version: bytes = b"1.1"

    def get(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    @property
    def error(self) -> str:
        """The mesh's own error code, or empty."""
        return (self.get(b"x-dstack-mesh-error") or b"").decode()


class Client:
    """One connection to a listener, with exact control of the bytes sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._h11 = h11.Connection(h11.CLIENT)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, address: TcpAddress, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, method: str = "GET") -> Answer:
        """Read one whole response to a request that was sent with `send`."""
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        trailing = self._h11.trailing_data[0] if isinstance(self._h11, h11.Connection) else b""
        if trailing:
            parser.receive_data(trailing)
        self._h11 = parser
        async with asyncio.timeout(20):
            return await self._answer(parser)

    async def _answer(self, parser: h11.Connection) -> Answer:
        interim: list[int] = []
        head: h11.Response | None = None
        body: list[bytes] = []
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = await self.reader.read(65536)
                if not data and head is None and not parser.trailing_data[0]:
                    raise ConnectionError("closed before a response")
                parser.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            else:
                assert isinstance(event, h11.EndOfMessage), event
                assert head is not None
                return Answer(
                    head.status_code,
                    head.reason,
                    list(head.headers),
                    b"".join(body),
                    list(event.headers),
                    interim,
                    head.http_version,
                )

    async def until(self, marker: bytes) -> bytes:
        """Read raw bytes until they contain `marker`; more may have come with it."""
        data = b""
        async with asyncio.timeout(20):
            while marker not in data:
                piece = await self.reader.read(65536)
                assert piece, f"closed after {data!r}"
                data += piece
        return data

    def reset(self) -> None:
        """End the connection with a reset."""
        reset(self.writer)

    async def closed(self) -> bytes:
        """Read to the end of the connection; a reset counts as one."""
        data = b""
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(65536):
                    data += piece
        return data


def request(
    method: str = "GET",
    target: str = "/",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    version: str = "1.1",
) -> bytes:
    """Write a request; a `Host` is added where none is given, a length where there is a body."""
    fields = list(headers)
    names = {name.lower() for name, _ in fields}
    if "host" not in names and version == "1.1":
        fields.insert(0, ("Host", "example.test"))
    if body and not names & {"content-length", "transfer-encoding"}:
        fields.append(("Content-Length", str(len(body))))
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"{method} {target} HTTP/{version}\r\n{lines}\r\n".encode("latin-1") + body


@dataclass
class Mesh:
    """A world with the sidecars and backends that a test has started in it."""

    world: World
    sidecars: dict[str, Sidecar] = field(default_factory=dict)
    backends: dict[str, Backend] = field(default_factory=dict)
    _running: list[Sidecar] = field(default_factory=list)

    def app(self, name: str) -> SimApp:
        return self.world.apps[name]

    def app_id(self, name: str) -> AppId:
        return self.app(name).app_id

    async def start(
        self, name: str, *, backend: bool = True, config: Path | None = None, **environ: str
    ) -> Sidecar:
        """Start the sidecar of app `name`, with a backend, and wait until it is open."""
        env = {**self.app(name).env, "MESH_OUTBOUND_LISTEN": "127.0.0.1:0"}
        env["MESH_ADMIN_LISTEN"] = "127.0.0.1:0"
        if backend and "MESH_BACKEND" not in environ:
            env["MESH_BACKEND"] = str(await self.start_backend(name))
        sidecar = await self.start_closed(name, config=config, **{**env, **environ})
        await sidecar.wait_open()
        await eventually(lambda: sidecar.directory.current is not None)
        return sidecar

    async def start_backend(self, name: str) -> Address:
        """Start a backend for app `name`, and give its address."""
        self.backends[name] = Backend(name)
        return await self.backends[name].start()

    async def start_closed(
        self, name: str, *, config: Path | None = None, **environ: str
    ) -> Sidecar:
        """Start a sidecar without waiting for its identity; `config` is its settings file."""
        env = {k: v for k, v in {**self.app(name).env, **environ}.items() if v != "unset"}
        sidecar = Sidecar(load_settings({}, env, config).settings)
        self._running.append(sidecar)
        self.sidecars[name] = sidecar
        await sidecar.start()
        return sidecar

    def outbound(self, name: str) -> TcpAddress:
        return tcp(self.sidecars[name].bound()["outbound"])

    def inbound(self, name: str) -> TcpAddress:
        return tcp(self.sidecars[name].bound()["inbound"])

    def admin(self, name: str) -> TcpAddress:
        return tcp(self.sidecars[name].bound()["admin"])

    async def call(
        self,
        caller: str,
        target: str | None,
        method: str = "GET",
        path: str = "/",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
    ) -> Answer:
        """Send one request on a connection of its own and read its answer."""
        fields = list(headers)
        if target is not None:
            app_id = self.app_id(target) if target in self.world.apps else target
            fields.append(("x-dstack-target-app", app_id))
        async with Client.connect(self.outbound(caller)) as client:
            await client.send(request(method, path, fields, body))
            return await client.answer(method)

    async def aclose(self) -> None:
        for sidecar in self._running:
            await sidecar.stop()
        for backend in self.backends.values():
            await backend.aclose()


@contextlib.asynccontextmanager
async def mesh(tmp_path: Path, apps: Iterable[str] = ("a", "b")) -> AsyncIterator[Mesh]:
    """Open a world of `apps`; everything started in it ends with the block."""
    async with World(list(apps), tmp_path) as world:
        one = Mesh(world)
        try:
            yield one
        finally:
            await one.aclose()


async def readyz(one: Mesh, name: str) -> tuple[int, str]:
    """Give the status of a sidecar's `/readyz`, and what it says of the identity."""
    async with Client.connect(one.admin(name)) as client:
        await client.send(request("GET", "/readyz"))
        answer = await client.answer()
    report = json.loads(answer.body)
    assert report["ready"] is (answer.status == 200)
    return answer.status, report["checks"]["identity"]["reason"]


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until `condition` holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def nobody_listens(address: TcpAddress, seconds: float = 8.0) -> None:
    """Wait until connections to `address` are refused."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                _, writer = await asyncio.open_connection(address.host, address.port)
            except ConnectionRefusedError:
                return
            writer.transport.abort()
            await asyncio.sleep(0.01)


def tcp(text: str | None) -> TcpAddress:
    assert text is not None
    host, _, port = text.rpartition(":")
    return TcpAddress(host, int(port))


def problem(answer: Answer, code: str, status: int) -> dict[str, object]:
    """Hold a mesh's own answer against the contract's form; give its fields."""
    named, _, remote = answer.error.partition("; ")
    assert (named, answer.status) == (code, status), (answer.status, answer.headers, answer.body)
    assert remote in ("", "remote")
    assert answer.get(b"content-type") == b"application/problem+json"
    fields: dict[str, object] = json.loads(answer.body)
    assert fields["status"] == status
    assert fields["code"] == code
    assert fields["title"]
    assert fields["detail"]
    assert fields["request_id"], "an error names the request, by an id made for it if need be"
    return fields


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Wire:
    """A connection at an `Origin`: bare bytes, and a record of all that came."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ahead = b""
        self.received = b""
        self.ended = False
        """Whether the peer has ended the connection, in order or by a reset."""
        self.finished = False
        """Whether this side has ended it."""

    async def read(self) -> bytes:
        """Give what is there next; nothing at the end."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        try:
            data = await self._reader.read(65536)
        except ConnectionError:
            data = b""
        self.received += data
        self.ended = not data
        return data

    async def until(self, marker: bytes) -> bytes:
        """Read up to and with `marker`; raises `EOFError` where the connection ends before."""
        data = b""
        while (at := data.find(marker)) < 0:
            piece = await self.read()
            if not piece:
                raise EOFError(data)
            data += piece
        end = at + len(marker)
        self._ahead = data[end:] + self._ahead
        return data[:end]

    async def head(self) -> bytes:
        """Read one head."""
        return await self.until(b"\r\n\r\n")

    async def to_end(self) -> None:
        """Read until the peer ends the connection."""
        while await self.read():
            pass

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def finish(self) -> None:
        """End the connection in order: FIN."""
        self._writer.close()

    def reset(self) -> None:
        """End the connection with a reset."""
        reset(self._writer)


class Origin:
    """A server of bare bytes: `serve` has each connection, which ends when it returns."""

    def __init__(self, serve: Callable[[Wire], Awaitable[None]]) -> None:
        self._serve = serve
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.wires: list[Wire] = []

    @property
    def received(self) -> bytes:
        """All that came, on all connections."""
        return b"".join(wire.received for wire in self.wires)

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> TcpAddress:
        self._server = await asyncio.start_server(self._accept, host, port, ssl=tls)
        bound_host, bound_port = self._server.sockets[0].getsockname()[:2]
        return TcpAddress(bound_host, bound_port)

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        wire = Wire(reader, writer)
        self.wires.append(wire)
        try:
            await self._serve(wire)
        except EOFError:
            wire.ended = True
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def origin(
    serve: Callable[[Wire], Awaitable[None]],
    host: str = "127.0.0.1",
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[tuple[Origin, TcpAddress]]:
    """Run an `Origin` for the block; give it and its address."""
    one = Origin(serve)
    try:
        yield one, await one.start(host, port, tls)
    finally:
        await one.aclose()


def answers(*responses: bytes) -> Callable[[Wire], Awaitable[None]]:
    """Serve each connection's requests, none of which has a body, with these bytes in turn."""

    async def serve(wire: Wire) -> None:
        for response in responses:
            await wire.head()
            await wire.send(response)
        await wire.to_end()

    return serve


@contextlib.asynccontextmanager
async def mesh_before(
    tmp_path: Path, serve: Callable[[Wire], Awaitable[None]], **environ: str
) -> AsyncIterator[tuple[Mesh, Origin]]:
    """Open a mesh of `a` and `b`, where `b`'s backend is an `Origin`; `environ` is for both."""
    async with origin(serve) as (backend, address), mesh(tmp_path) as one:
        await one.start("a", backend=False, **environ)
        await one.start("b", backend=True, MESH_BACKEND=str(address), **environ)
        yield one, backend

"""Where TLS's hostile peers meet real sidecars: the listener of `b`, and `a` that calls."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dstack_mesh.model import AppId, TcpAddress
from dstack_mesh.sidecar import Sidecar
from dstack_mesh.sim.kms import Kms
from tests.integration.harness import Answer, Mesh, eventually, mesh, request
from tests.integration.tls_peers import call_inbound, caller_context
from tests.tls.records import DEADLINE, SocketChannel
from tests.tls.tls13 import Shown

CALLER = AppId("cc" * 20)
OTHER = AppId("dd" * 20)
ASK = request("GET", "/secret-path")

_Result = TypeVar("_Result")


@dataclass
class Listening:
    """Sidecar `b` with a backend, and everything by which harm to it would be seen."""

    mesh: Mesh

    @property
    def kms(self) -> Kms:
        return self.mesh.world.kms

    @property
    def address(self) -> TcpAddress:
        return self.mesh.inbound("b")

    @property
    def sidecar(self) -> Sidecar:
        return self.mesh.sidecars["b"]

    def good(self) -> Shown:
        return Shown.of(self.kms.issue(CALLER))

    def seen(self) -> tuple[int, int]:
        """How much has reached the backend."""
        backend = self.mesh.backends["b"]
        return backend.connections, len(backend.requests)

    def busy(self) -> int:
        """How many handshakes are going on, and connections of callers are open."""
        listener = self.sidecar._listener
        assert listener is not None
        return len(listener._handshakes) + len(self.sidecar._inbound.connections)

    async def serves(self) -> None:
        """Have a good caller served."""
        context = caller_context(self.kms.root_pem, self.kms.issue(CALLER))
        answer: Answer = await call_inbound(self.address, context)
        assert answer.body == b"hello\n", answer

    async def attack(self, act: Callable[[SocketChannel], _Result]) -> _Result:
        """Run `act` in a thread with a connection; nothing of it may reach the backend."""
        before = self.seen()
        result = await asyncio.to_thread(self._act, act)
        await eventually(lambda: self.busy() == 0)
        assert self.seen() == before, "something reached the backend"
        return result

    def _act(self, act: Callable[[SocketChannel], _Result]) -> _Result:
        with SocketChannel.to(self.address) as channel:
            return act(channel)

    async def say(self, data: bytes) -> bytes:
        """Send bytes and end; give all that comes back until the end of the connection."""

        def act(channel: SocketChannel) -> bytes:
            channel.send(data)
            channel.finish()
            return channel.to_end()

        return await self.attack(act)


@contextlib.asynccontextmanager
async def listening(directory: Path, version: str, **environ: str) -> AsyncIterator[Listening]:
    async with mesh(directory, ["b"]) as one:
        await one.start("b", backend=True, MESH_TLS_MIN_VERSION=version, **environ)
        there = Listening(one)
        await there.serves()
        yield there
        await there.serves()


@dataclass
class HandMade:
    """An impostor whose bytes a test writes itself, one connection in a thread at a time."""

    serve: Callable[[SocketChannel], None]
    address: TcpAddress = field(init=False)
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = TcpAddress("127.0.0.1", self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    self.serve(SocketChannel(sock))
                except BaseException as error:  # the test is told of it, whatever it is
                    self.failures.append(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE)


@dataclass
class Calling:
    """Sidecar `a`, which calls whomever a test puts up, and a good target `b`."""

    mesh: Mesh

    @property
    def kms(self) -> Kms:
        return self.mesh.world.kms

    @contextlib.contextmanager
    def put_up(self, app_id: AppId, serve: Callable[[SocketChannel], None]) -> Iterator[HandMade]:
        """Have `serve` behind the gateway where `app_id` should be."""
        impostor = HandMade(serve)
        self.mesh.world.gateway.add_route(app_id, impostor.address.host, impostor.address.port)
        try:
            yield impostor
        finally:
            impostor.close()
            self.mesh.world.gateway.remove_route(app_id)

    async def ask(self, serve: Callable[[SocketChannel], None], app_id: AppId) -> Answer:
        """Call `app_id`, for which `serve` stands in; its own checks must have held."""
        with self.put_up(app_id, serve) as impostor:
            answer = await self.mesh.call(
                "a", app_id, "POST", "/secret", [("authorization", "secret")], b"secret body"
            )
            await asyncio.to_thread(impostor.close)
            assert impostor.connections == 1, "one attempt and no second one"
            for failure in impostor.failures:
                raise failure
        return answer


@contextlib.asynccontextmanager
async def calling(directory: Path, version: str, **environ: str) -> AsyncIterator[Calling]:
    async with mesh(directory) as one:
        await one.start("a", backend=False, MESH_TLS_MIN_VERSION=version, **environ)
        await one.start("b", MESH_TLS_MIN_VERSION=version)
        yield Calling(one)
        assert (await one.call("a", "b")).body == b"hello\n"


def resident() -> int:
    """How much memory this process has, the sidecar's included, in bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

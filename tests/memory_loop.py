"""An event loop without sockets or a clock, and the far ends of the connections that it makes."""

from __future__ import annotations

import asyncio
import heapq
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.relay.worker import Worker
from tests.memory_tls import TARGET, Shown, ShownTls, shown_tls
from tests.relay.fakes import FakeTransport

_MAX_STEPS = 100_000


@dataclass
class Attempt:
    """A TLS connection that the mesh is opening, and whose handshake is not done."""

    address: object
    server_name: str
    settled: asyncio.Future[Shown]


class MemoryLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as the data plane asks for, run by hand and with its own time."""

    def __init__(self, opened: Callable[[FarEnd], None]) -> None:
        self.attempts: list[Attempt] = []
        self.faults: list[str] = []
        self.resolves = True
        self.accepts = True
        self.app_id = TARGET
        self._opened = opened
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer_count = 0
        self._now = 1000.0
        self._addresses: dict[int, object] = {}

    # What runs it.

    def do(self, act: Callable[..., object], *args: object) -> None:
        """Call `act` as if from the loop, then run until there is nothing left to do."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            act(*args)
            self._run()
        finally:
            asyncio._set_running_loop(before)

    def pass_time(self, seconds: float) -> None:
        """Let timers that are due within `seconds` happen, each at its time."""
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            self._now, _, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                self.do(handle._run)
        self._now = end

    def _run(self) -> None:
        ready = self._ready
        for _ in range(_MAX_STEPS):
            if not ready:
                return
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()
        raise AssertionError(f"not at rest after {_MAX_STEPS} steps")

    # What asyncio and the mesh call.

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]  # no type variable is needed here, and below
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **_: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(f"{context.get('message')}: {context.get('exception')!r}")

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        if not self.resolves:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))]

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        if not self.accepts:
            raise ConnectionRefusedError("refused")
        self._addresses[sock.fileno()] = address

    async def create_connection(  # type: ignore[override]  # the one form of it that is used
        self,
        protocol_factory: Callable[[], Upstream],
        *,
        sock: socket.socket,
        **_: Any,
    ) -> tuple[FakeTransport, Upstream]:
        """Give a transport in memory; `sock` was never connected, and is closed."""
        protocol = protocol_factory()
        return self._open(sock, protocol, None, ""), protocol

    async def open_tls(
        self,
        worker: Worker,
        sock: socket.socket,
        protocol: Upstream,
        context: ssl.SSLContext,
        server_name: str | None,
        session: ssl.SSLSession | None = None,
    ) -> FakeTransport:
        """Give one on which the handshake goes as the test says: see `tls_client.open_tls`."""
        address = self._addresses[sock.fileno()]
        attempt = Attempt(address, server_name or "", self.create_future())
        self.attempts.append(attempt)
        try:
            tls = shown_tls(await attempt.settled, self.app_id)
        except BaseException:
            sock.close()
            raise
        return self._open(sock, protocol, tls, server_name or "")

    def _open(
        self, sock: socket.socket, protocol: Upstream, tls: ShownTls | None, server_name: str
    ) -> FakeTransport:
        address = self._addresses.pop(sock.fileno())
        sock.close()
        transport = FakeTransport(protocol, tls=tls is not None)
        if tls is not None:
            tls.transport = transport
            transport.extra["ssl_object"] = tls
        self._opened(FarEnd(self, transport, address, server_name))
        protocol.connection_made(transport)
        return transport


class FarEnd:
    """What is at the other end of one of the mesh's connections: a client, or a server."""

    def __init__(
        self, loop: MemoryLoop, transport: FakeTransport, address: object = None, name: str = ""
    ) -> None:
        self._loop = loop
        self.transport = transport
        self.address = address
        """Where the mesh connected to: a host and port, or a path."""
        self.server_name = name
        self._finished = False

    @property
    def received(self) -> bytes:
        """All that the mesh has sent here."""
        return bytes(self.transport.sent)

    @property
    def closed(self) -> bool:
        """Whether the mesh has ended the connection, or its own side of it."""
        return self.transport.is_closing() or self.transport.ended

    @property
    def cut(self) -> bool:
        """Whether the mesh ended it with a reset."""
        return self.transport.aborted

    @property
    def pooled(self) -> bool:
        """Whether the mesh keeps the connection for another request."""
        upstream = self.transport.protocol
        return isinstance(upstream, Upstream) and upstream in upstream.lane.idle

    def sends(self, *pieces: bytes) -> None:
        """Have each of `pieces` arrive in a read of its own, all other work done in between."""
        for piece in pieces:
            if piece and not self._finished and not self.transport.is_closing():
                self._loop.do(self.transport.receive, piece)

    def sends_at_once(self, *pieces: bytes) -> None:
        """Have `pieces` arrive in reads of their own, with nothing else done in between."""

        def arrive() -> None:
            for piece in pieces:
                if piece and not self.transport.is_closing():
                    self.transport.receive(piece)

        if not self._finished:
            self._loop.do(arrive)

    def ends(self) -> None:
        """Finish sending: FIN, or TLS's close-notify."""
        if not self._finished and not self.transport.is_closing():
            self._finished = True
            self._loop.do(self.transport.receive_eof)

    def breaks(self, error: Exception | None = None) -> None:
        """Lose the connection."""
        if not self.transport.lost:
            self._finished = True
            self._loop.do(self.transport.break_off, error)

    def stalls(self) -> None:
        """Take nothing more of what the mesh sends."""
        self._loop.do(self.transport.stall)

    def flows(self) -> None:
        """Take everything again."""
        if not self.transport.lost:
            self._loop.do(self.transport.flow)

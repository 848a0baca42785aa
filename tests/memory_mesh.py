"""Whole proxies without sockets, TLS or a clock: for properties, and for fuzzing.

Everything between the two ends is the mesh's own code: listener's connections, outbound proxy or
terminator, exchange, pool, connectors and the check of the peer's chain. What is put in its place
is the event loop below, which hands out transports in memory, and what TLS would have verified.

    with OutboundMesh() as mesh:
        mesh.client_sends(TO_TARGET)
        assert mesh.upstream_received == []  # the handshake is not over yet
        mesh.verify()
        mesh.upstream_sends(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
        assert mesh.client_received.startswith(b"HTTP/1.1 204")

Nothing happens by itself: each call runs until everything has come to rest, and time passes in
`pass_time` alone. Leaving the block raises where an error was not one of the project's own.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_mesh.dstack.gateway import GatewayDirectory
from dstack_mesh.gateway_domain import Gateway, GatewayDomain
from dstack_mesh.identity.peers import VerifiedPeers
from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.inbound.terminator import InboundOptions, Terminator
from dstack_mesh.model import AppId, PeerIdentity, Role, TcpAddress, UnixAddress
from dstack_mesh.outbound.proxy import OutboundOptions, OutboundProxy
from dstack_mesh.policy.allow import Allow
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.relay.worker import Worker
from dstack_mesh.sim.kms import Kms
from tests.identities import APP_A, APP_B, FakeIdentity, snapshot_of
from tests.relay.fakes import FakeTransport

OURS = APP_A
"""The app that every mesh here is the sidecar of."""

TARGET = APP_B
"""The app that `TO_TARGET` names, and the caller of an inbound mesh."""

OTHER = AppId("cc" * 20)

DOMAIN = GatewayDomain("apps.example", 8443)
AGENT = UnixAddress("/run/dstack.sock")
BACKEND = TcpAddress("127.0.0.1", 8080)
CALLER_ADDRESS = "192.0.2.7"

TARGET_LINE = b"x-dstack-target-app: %b\r\n" % TARGET.encode()
TO_TARGET = b"GET / HTTP/1.1\r\nHost: h\r\n" + TARGET_LINE + b"\r\n"

CONNECT_TIMEOUT = 10.0
_MAX_STEPS = 100_000
_made_up_id = re.compile(rb'"request_id":"[0-9a-f]{32}"')


def steady(received: bytes) -> bytes:
    """Give what was received without what is drawn anew each time: ids made for errors."""
    return _made_up_id.sub(b'"request_id":"%032d"' % 0, received)


class Shown(Enum):
    """What the other end of a TLS connection turns out to be."""

    TARGET = "a valid chain of the app asked for"
    OTHER_APP = "a valid chain of another app"
    OTHER_KMS = "a chain that verified, but under another root"
    NO_CHAIN = "a certificate and no verified chain"
    NOTHING = "no certificate at all"
    RESUMED = "a resumed session, which has no chain"
    UNVERIFIED = "a certificate that TLS does not verify"
    REFUSES_US = "an alert about our own certificate"
    RESET = "a connection that ends in the handshake"


@dataclass
class ShownTls:
    """What the mesh asks of an `ssl.SSLObject` once the handshake is done."""

    chain: list[bytes]
    leaf: bytes | None
    session_reused: bool = False
    transport: FakeTransport | None = None

    def get_verified_chain(self) -> list[bytes]:
        return self.chain

    def getpeercert(self, binary_form: bool = False) -> bytes | None:
        assert binary_form
        return self.leaf


@lru_cache(maxsize=1)
def _snapshot() -> Snapshot:
    return snapshot_of(Kms.create(b"memory mesh"), OURS)


@lru_cache(maxsize=32)
def _chain(app_id: AppId, kms: bytes) -> list[bytes]:
    issued = Kms.create(kms).issue(app_id)
    certificates = [x509.load_pem_x509_certificate(pem) for pem in issued.chain_pem]
    return [certificate.public_bytes(Encoding.DER) for certificate in certificates]


def _shown(shown: Shown, app_id: AppId) -> ShownTls:
    chain = _chain(app_id, b"memory mesh")
    if shown is Shown.TARGET:
        return ShownTls(chain, chain[0])
    if shown is Shown.OTHER_APP:
        other = _chain(OTHER if app_id != OTHER else TARGET, b"memory mesh")
        return ShownTls(other, other[0])
    if shown is Shown.OTHER_KMS:
        foreign = _chain(app_id, b"another")
        return ShownTls(foreign, foreign[0])
    if shown is Shown.RESUMED:
        return ShownTls([], chain[0], session_reused=True)
    if shown is Shown.NO_CHAIN:
        return ShownTls([], chain[0])
    if shown is Shown.NOTHING:
        return ShownTls([], None)
    raise _handshake_error(shown)


def _handshake_error(shown: Shown) -> OSError:
    if shown is Shown.UNVERIFIED:
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "self-signed certificate"
        return error
    if shown is Shown.REFUSES_US:
        alert = ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca")
        alert.reason = "TLSV1_ALERT_UNKNOWN_CA"
        return alert
    return ConnectionResetError("reset")


class WatchedPeers:
    """The real check of chains; notes what had been written by the time it was made."""

    def __init__(self, real: VerifiedPeers) -> None:
        self._real = real
        self.written_before = b""
        """All that went out, on any connection, before the peer's chain was looked at."""

    def identify(self, ssl_object: Any, role: Role) -> PeerIdentity | None:
        assert isinstance(ssl_object, ShownTls)
        assert ssl_object.transport is not None
        self.written_before += ssl_object.transport.sent
        return self._real.identify(ssl_object, role)  # type: ignore[arg-type]


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
        ssl: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        **_: Any,
    ) -> tuple[FakeTransport, Upstream]:
        """Give a transport in memory; `sock` was never connected, and is closed."""
        address = self._addresses.pop(sock.fileno())
        sock.close()
        tls = None
        if ssl is not None:
            attempt = Attempt(address, server_hostname or "", self.create_future())
            self.attempts.append(attempt)
            tls = _shown(await attempt.settled, self.app_id)
        protocol = protocol_factory()
        transport = FakeTransport(protocol, tls=tls is not None)
        if tls is not None:
            tls.transport = transport
            transport.extra["ssl_object"] = tls
        self._opened(FarEnd(self, transport, address, server_hostname or ""))
        protocol.connection_made(transport)
        return transport, protocol


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


class _Faults(logging.Handler):
    """Collects what the data plane caught and logged as a mistake of its own."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        self._faults.append(f"{record.getMessage()} {getattr(record, 'fields', '')}")


_LOGGER = logging.getLogger("dstack_mesh")


class MemoryMesh:
    """What both directions have in common."""

    direction = ""

    def __init__(self, *, timeouts: Timeouts | None = None, max_connections: int = 100) -> None:
        self.upstreams: list[FarEnd] = []
        """Servers that the mesh has connected to, in their order; past ones stay."""
        self.records: list[Exchange] = []
        self.loop = MemoryLoop(self.upstreams.append)  # type: ignore[abstract]  # what is used is there
        self.worker = Worker(self.loop, timeouts or Timeouts(), self.loop.time)
        self.pool = Pool(self.worker)
        self.peers = WatchedPeers(_snapshot().peers)
        self.identity = FakeIdentity(
            replace(_snapshot(), peers=self.peers)  # type: ignore[arg-type]
        )
        self.service = Service(
            self.worker,
            self.direction,
            max_connections=max_connections,
            record=lambda _, exchange: self.records.append(exchange),
        )
        self.clients: list[FarEnd] = []
        self._log_handler = _Faults(self.loop.faults)
        _LOGGER.addHandler(self._log_handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if error is None:
            assert not self.loop.faults, self.loop.faults

    def close(self) -> None:
        """Leave nothing behind."""

        def end() -> None:
            self.service.abort()
            self.worker.close()
            for attempt in self.loop.attempts:
                attempt.settled.cancel()

        self.loop.do(end)
        _LOGGER.removeHandler(self._log_handler)

    def _accept(self, protocol: Downstream[Any], tls: ShownTls | None = None) -> FarEnd:
        transport = FakeTransport(protocol, tls=tls is not None)
        transport.extra["peername"] = (CALLER_ADDRESS, 40_000)
        if tls is not None:
            tls.transport = transport
            transport.extra["ssl_object"] = tls
        client = FarEnd(self.loop, transport)
        self.clients.append(client)
        self.loop.do(protocol.connection_made, transport)
        return client

    # The one client and the latest server, which is all that most tests have.

    @property
    def client(self) -> FarEnd:
        return self.clients[0]

    @property
    def upstream(self) -> FarEnd:
        return self.upstreams[-1]

    def client_sends(self, *pieces: bytes) -> None:
        self.client.sends(*pieces)

    def upstream_sends(self, *pieces: bytes) -> None:
        self.upstream.sends(*pieces)

    @property
    def client_received(self) -> bytes:
        return self.client.received

    @property
    def upstream_received(self) -> list[bytes]:
        """What each server was sent, in the order of their connections."""
        return [server.received for server in self.upstreams]

    @property
    def closed(self) -> bool:
        """Whether the mesh has ended the client's connection, or its own side of it."""
        return self.client.closed

    @property
    def codes(self) -> list[str]:
        """The mesh's own error codes of the exchanges that have ended; empty for none."""
        return [exchange.code for exchange in self.records]

    def pass_time(self, seconds: float) -> None:
        """Let time pass for the sweep and for every time limit."""
        self.loop.pass_time(seconds)


class OutboundMesh(MemoryMesh):
    """The application's side: a plain client, targets behind TLS, and a plain guest agent."""

    direction = "outbound"

    def __init__(
        self,
        *,
        gateway: Gateway = DOMAIN,
        default_port: int = 443,
        timeouts: Timeouts | None = None,
        max_connections: int = 100,
    ) -> None:
        super().__init__(timeouts=timeouts, max_connections=max_connections)
        self.proxy = OutboundProxy(
            self.pool,
            self.identity,  # type: ignore[arg-type]
            GatewayDirectory(configured=gateway, sys_config=Path("unused")),
            OutboundOptions(default_port, "all", AGENT, None, CONNECT_TIMEOUT),
        )
        self.accept()

    def accept(self) -> FarEnd:
        """Have another client connect."""
        return self._accept(self.service.protocol(self.proxy))

    @property
    def handshaking(self) -> list[Attempt]:
        """Connections being opened, of which nothing is verified yet."""
        return [attempt for attempt in self.loop.attempts if not attempt.settled.done()]

    def verify(self, shown: Shown | bool = True, app_id: AppId = TARGET) -> FarEnd | None:
        """Finish the oldest handshake in progress, with a peer that shows `shown`.

        True is the app asked for (`app_id`), False another one. Gives the connection, if TLS has
        made one; that of a peer that was refused is closed.
        """
        if isinstance(shown, bool):
            shown = Shown.TARGET if shown else Shown.OTHER_APP
        waiting = self.handshaking
        if not waiting:
            return None
        before = len(self.upstreams)
        self.loop.attempts = waiting[1:]
        self.loop.app_id = app_id
        self.loop.do(waiting[0].settled.set_result, shown)
        return self.upstreams[-1] if len(self.upstreams) > before else None

    @property
    def targets(self) -> list[FarEnd]:
        """Servers reached over TLS: all but the guest agent."""
        return [server for server in self.upstreams if server.server_name]

    @property
    def agents(self) -> list[FarEnd]:
        return [server for server in self.upstreams if not server.server_name]


class InboundMesh(MemoryMesh):
    """The other CVMs' side: callers behind TLS, and a plain backend."""

    direction = "inbound"

    def __init__(
        self,
        *,
        caller_app_id: AppId = TARGET,
        shown: Shown = Shown.TARGET,
        allow: str = "any",
        timeouts: Timeouts | None = None,
        max_connections: int = 100,
    ) -> None:
        super().__init__(timeouts=timeouts, max_connections=max_connections)
        self.terminator = Terminator(
            self.pool,
            self.identity,  # type: ignore[arg-type]
            InboundOptions(BACKEND, Allow.parse(allow), CONNECT_TIMEOUT),
        )
        self.accept(caller_app_id, shown)

    def accept(self, app_id: AppId = TARGET, shown: Shown = Shown.TARGET) -> FarEnd:
        """Have another caller connect, its handshake done."""
        snapshot = self.identity.require()
        protocol = self.service.protocol(self.terminator.handler(snapshot))
        return self._accept(protocol, _shown(shown, app_id))

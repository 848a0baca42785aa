"""Whole proxies without sockets, TLS or a clock: for properties, and for fuzzing.

Everything between the two ends is the mesh's own code: listener's connections, outbound proxy or
terminator, exchange, pool, connectors and the check of the peer's chain. What is put in its place
is the event loop, which hands out transports in memory (`memory_loop.py`), and what TLS would have
verified (`memory_tls.py`).

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

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dstack_mesh.dstack.gateway import GatewayDirectory
from dstack_mesh.gateway_domain import Gateway, GatewayDomain
from dstack_mesh.identity.peers import VerifiedPeers
from dstack_mesh.inbound.terminator import InboundOptions, Terminator
from dstack_mesh.model import AppId, PeerIdentity, Role, TcpAddress, UnixAddress
from dstack_mesh.outbound.proxy import OutboundOptions, OutboundProxy
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.decide import Policy
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.worker import Worker
from tests.identities import FakeIdentity
from tests.memory_loop import Attempt, MemoryLoop
from tests.memory_loop import FarEnd as FarEnd
from tests.memory_tls import OTHER as OTHER
from tests.memory_tls import OURS as OURS
from tests.memory_tls import TARGET as TARGET
from tests.memory_tls import Shown as Shown
from tests.memory_tls import ShownTls, our_snapshot, shown_tls
from tests.relay.fakes import FakeTransport

DOMAIN = GatewayDomain("apps.example", 8443)
AGENT = UnixAddress("/run/dstack.sock")
BACKEND = TcpAddress("127.0.0.1", 8080)
CALLER_ADDRESS = "192.0.2.7"

TARGET_LINE = b"x-dstack-target-app: %b\r\n" % TARGET.encode()
TO_TARGET = b"GET / HTTP/1.1\r\nHost: h\r\n" + TARGET_LINE + b"\r\n"

CONNECT_TIMEOUT = 10.0
_made_up_id = re.compile(rb'"request_id":"[0-9a-f]{32}"')


def steady(received: bytes) -> bytes:
    """Give what was received without what is drawn anew each time: ids made for errors."""
    return _made_up_id.sub(b'"request_id":"%032d"' % 0, received)


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
        self.peers = WatchedPeers(our_snapshot().peers)
        self.identity = FakeIdentity(
            replace(our_snapshot(), peers=self.peers)  # type: ignore[arg-type]
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
            open_tls=self.loop.open_tls,
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
            InboundOptions(BACKEND, Current(Policy(Allow.parse(allow))), CONNECT_TIMEOUT),
        )
        self.accept(caller_app_id, shown)

    def accept(self, app_id: AppId = TARGET, shown: Shown = Shown.TARGET) -> FarEnd:
        """Have another caller connect, its handshake done."""
        snapshot = self.identity.require()
        protocol = self.service.protocol(self.terminator.handler(snapshot))
        return self._accept(protocol, shown_tls(shown, app_id))

"""Our end of TLS on a real socket, and the other end in a thread, which decides each byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import uvloop
from tests.identity.conftest import Issued, Kms

from dstack_mesh.identity import tls as contexts
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.stream import StreamProtocol
from dstack_mesh.relay.tls import TlsTransport
from dstack_mesh.relay.tls_client import open_tls
from dstack_mesh.relay.worker import Worker

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
DEADLINE = 20.0
MIB = 1 << 20

NewLoop = Callable[[], asyncio.AbstractEventLoop]
VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
LOOPS = pytest.mark.parametrize(
    "new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
)
SIDES = pytest.mark.parametrize("server_side", [True, False], ids=["our server", "our client"])

_Result = TypeVar("_Result")


def pattern(size: int) -> bytes:
    """Give bytes of which no part is like the next: what is lost, doubled or moved is seen."""
    return b"".join(n.to_bytes(4) for n in range(size // 4 + 1))[:size]


class Recorder(StreamProtocol):
    """The protocol behind TLS. What may not happen to one is an error of the loop's."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.events: list[str] = []
        self.received = bytearray()
        self.pieces: list[int] = []
        self.failure: Exception | None = None
        self.paused = False
        self.on_made: Callable[[], None] = lambda: None
        self.on_data: Callable[[bytes], None] = lambda data: None
        self.on_eof: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self.events == []
        self.transport = transport
        self.events.append("made")
        self.on_made()

    def data_received(self, data: bytes) -> None:
        assert self.events == ["made"], f"data after {self.events}"
        assert isinstance(data, bytes)
        assert data
        self.pieces.append(len(data))
        self.received += data
        self.on_data(data)

    def eof_received(self) -> bool:
        assert self.events == ["made"]
        self.events.append("eof")
        self.on_eof()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        assert "made" in self.events
        assert "lost" not in self.events
        self.events.append("lost")
        self.failure = exc

    def pause_writing(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_writing(self) -> None:
        assert self.paused
        self.paused = False


class Peer:
    """The other side: blocking, its TLS in memory, so that a test has every byte in its hands."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        sock.settimeout(DEADLINE)
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side)

    def last_flight(self) -> bytes:
        """Do the handshake; give what is its last flight, not sent yet (it may be empty)."""
        while True:
            try:
                self.tls.do_handshake()
                return self._outgoing.read()
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._more()

    def connect(self) -> None:
        self.sock.sendall(self.last_flight())

    def seal(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        self.sock.sendall(self.seal(data))

    def read(self, size: int) -> bytes:
        """Read that much of what our side says."""
        found = b""
        while len(found) < size:
            found += self._read()
        return found

    def read_to_end(self) -> tuple[bytes, list[str]]:
        """Give what our side says to its end, and what it ended by."""
        pieces, ends = [], []
        while True:
            try:
                if piece := self._read():
                    pieces.append(piece)
                    continue
                ends.append("close-notify")
                ends.append("FIN" if self.sock.recv(1) == b"" else "more")
            except EOFError:
                ends.append("FIN")
            except ConnectionError:
                ends.append("RST")
            except ssl.SSLError as error:
                ends.append(error.reason or "?")
            return b"".join(pieces), ends

    def _read(self) -> bytes:
        while True:
            try:
                return self.tls.read(65536)
            except ssl.SSLWantReadError:
                self._more()

    def _more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self._incoming.write(data)


def bare_context(
    issued: Issued | None, version: ssl.TLSVersion, *, server_side: bool
) -> ssl.SSLContext:
    """Give a context for a peer that verifies nobody, and does whatever OpenSSL does by default."""
    side = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    if issued is not None:
        contexts._load_key(context, issued.credentials)
    return context


def tcp_pair(*, small: bool = False) -> tuple[socket.socket, socket.socket]:
    """Give both ends of a TCP connection; with little room in the kernel where `small`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if small:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours.setblocking(False)
    return ours, theirs


@dataclass
class Case:
    """One of the ways in which each test is run."""

    kms: Kms
    new_loop: NewLoop
    version: ssl.TLSVersion = TLS13
    server_side: bool = True
    timeouts: Timeouts = field(default_factory=Timeouts)
    caller: Issued | None = None
    """Whose certificate the peer shows; by default one of a good app."""
    small: bool = False
    verifying: bool = False
    """Whether the peer wants a certificate, and has no root to verify it by."""

    def run(self, main: Callable[[Scene], Awaitable[None]], *, faults: int = 0) -> None:
        """Run `main`; the loop must have heard of as many faults of protocols as said."""

        async def bounded() -> None:
            async with asyncio.timeout(DEADLINE):
                scene = Scene(self)
                try:
                    await main(scene)
                finally:
                    await scene.clean_up()
                assert len(scene.faults) == faults, scene.faults

        with asyncio.Runner(loop_factory=self.new_loop) as runner:
            runner.run(bounded())


class Scene:
    """Both ends, before their handshake."""

    def __init__(self, case: Case) -> None:
        self.case = case
        loop = asyncio.get_running_loop()
        self.faults: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: self.faults.append(context))
        self.worker = Worker(loop, case.timeouts)
        self.protocol = Recorder()
        self.sock, theirs = tcp_pair(small=case.small)
        credentials = case.kms.leaf().credentials
        make = contexts.server_context if case.server_side else contexts.client_context
        self.context = make(credentials, case.version)
        if case.version is TLS12:
            self.context.maximum_version = TLS12
        shown = case.caller or case.kms.leaf()
        context = bare_context(shown, case.version, server_side=not case.server_side)
        if case.verifying:
            context.verify_mode = ssl.CERT_REQUIRED
        self.peer = Peer(theirs, context, server_side=not case.server_side)
        self.settled: list[Exception | None] = []
        self.ours: Any = None
        """A `TlsTransport`; of the client's side once its handshake is done."""

    async def accept(self, deadline: float | None = None) -> None:
        """Have our server begin; `deadline` is seconds from now."""
        self.ours = TlsTransport(
            self.worker,
            self.protocol,
            lambda incoming, outgoing: self.context.wrap_bio(incoming, outgoing, True),
            self.settled.append,
            server_side=True,
            deadline=self.worker.clock() + (DEADLINE if deadline is None else deadline),
        )
        await self.worker.loop.connect_accepted_socket(self.ours.as_protocol, self.sock)

    async def open(self) -> None:
        """Do our client's handshake. Raises what `open_tls` does."""
        self.ours = await open_tls(self.worker, self.sock, self.protocol, self.context, None)

    async def meet(self, last_with: Callable[[], bytes] = lambda: b"") -> None:
        """Do the handshake; the peer sends what `last_with` gives together with its last flight."""

        def act() -> None:
            self.peer.sock.sendall(self.peer.last_flight() + last_with())

        peer = asyncio.create_task(asyncio.to_thread(act))
        if self.case.server_side:
            await self.accept()
        else:
            await self.open()
        await peer
        await self.until(lambda: bool(self.protocol.events))

    async def peer_does(self, act: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.to_thread(act, *args)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - of what has no event, in threads too
            await asyncio.sleep(0.001)

    async def lost(self) -> Exception | None:
        """Wait for the end; give what the protocol is told of it."""
        await self.until(lambda: self.protocol.events[-1:] == ["lost"])
        return self.protocol.failure

    async def clean_up(self) -> None:
        if self.ours is not None:
            self.ours.abort()
        self.peer.sock.close()
        for _ in range(5):
            await asyncio.sleep(0)
        self.sock.close()
        self.worker.close()

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
from tests.identities import APP_A, APP_B, FakeIdentity, snapshot_of
from tests.integration.harness import Client, eventually, request

from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.inbound import listener as module
from dstack_mesh.inbound.listener import TlsListener
from dstack_mesh.listen import bind
from dstack_mesh.model import TcpAddress
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.interfaces import Handler, Plan
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.listeners import Listeners
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.worker import Worker
from dstack_mesh.sim.kms import Kms
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import RequestLine

KMS = Kms.create(b"listener")
OURS = snapshot_of(KMS, APP_A)
CALLER = snapshot_of(KMS, APP_B).client_context


class Hello(Handler[Plan]):
    """Answers everything itself."""

    def connected(self, transport: asyncio.Transport) -> None:
        assert transport.get_extra_info("ssl_object") is not None

    def plan(self, line: RequestLine, block: bytes) -> Plan:
        return Plan(parse_request_fields(block, line.minor, frozenset(), line.authority))

    def route(self, line: RequestLine, plan: Plan, last: Route | None = None) -> Answer:
        return Answer(200, b"hello\n", "text/plain")


class FakeTerminator:
    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def handler(self, snapshot: Snapshot) -> Hello:
        self.snapshots.append(snapshot)
        return Hello()


class Rig:
    def __init__(self, *, max_connections: int = 10, head: float = 10.0) -> None:
        loop = asyncio.get_running_loop()
        self.worker = Worker(loop, Timeouts(head=head))
        self.service = Service(self.worker, "inbound", max_connections=max_connections)
        self.terminator = FakeTerminator()
        self.identity = FakeIdentity(OURS)
        self.handshakes: list[str] = []
        self.listener = TlsListener(
            self.service,
            self.terminator,  # type: ignore[arg-type]
            self.identity,  # type: ignore[arg-type]
            max_connections,
            self.handshakes.append,
        )
        self.sock = bind(TcpAddress("127.0.0.1", 0))
        self.listeners = Listeners(loop)
        self.address = TcpAddress(*self.sock.getsockname())

    def start(self) -> None:
        take, handshakes = self.listener.take, self.listener.handshakes
        self.listeners.serve_tls("inbound", self.sock, self.service, take, handshakes)

    async def hello(self, context: ssl.SSLContext = CALLER) -> None:
        """Do a whole exchange on a connection of its own."""
        async with Client.connect(self.address, context) as client:
            await client.send(request())
            assert (await client.answer()).body == b"hello\n"


@contextlib.asynccontextmanager
async def listening(**said: float) -> AsyncIterator[Rig]:
    rig = Rig(**said)  # type: ignore[arg-type]
    rig.start()
    try:
        yield rig
    finally:
        rig.listeners.abort()
        rig.listener.abort()
        rig.service.abort()
        await eventually(lambda: not rig.service.connections and not rig.listener.handshakes())
        rig.worker.close()
        rig.sock.close()


async def closed(client: Client) -> bytes:
    """Give all that comes up to the end of the connection."""
    async with asyncio.timeout(10):
        return await client.closed()


async def test_a_connection_is_served_after_its_handshake() -> None:
    async with listening() as rig:
        await rig.hello()
        await rig.hello()
        assert rig.handshakes == ["ok", "ok"]
        assert rig.terminator.snapshots == [OURS, OURS]


async def test_a_new_identity_is_for_the_connections_after_it() -> None:
    async with listening() as rig:
        await rig.hello()
        rig.identity.current = new = snapshot_of(KMS, APP_A, generation=2)
        await rig.hello()
        assert rig.terminator.snapshots == [OURS, new]


async def test_the_limit_closes_before_tls() -> None:
    async with listening(max_connections=1) as rig:
        async with Client.connect(rig.address, CALLER) as first:
            await first.send(request())
            await first.answer()
            async with Client.connect(rig.address) as second:
                assert await closed(second) == b"", "not one byte, of TLS or else"
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await rig.hello()
            assert rig.handshakes == ["ok"], "there was no other handshake"
            await first.send(request())
            assert (await first.answer()).status == 200
        await eventually(lambda: not rig.service.connections)
        await rig.hello()


async def test_the_oldest_handshake_gives_way() -> None:
    async with listening(max_connections=2, head=60.0) as rig, contextlib.AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(Client.connect(rig.address)) for _ in range(2)]
        await eventually(lambda: rig.listener.handshakes() == 2)
        await rig.hello()
        assert await closed(silent[0]) == b""
        assert rig.listener.handshakes() == 1, "the younger one has its time still"
        assert rig.handshakes == ["failed", "ok"]


async def test_handshakes_and_connections_together_keep_the_limit() -> None:
    async with listening(max_connections=2, head=60.0) as rig, contextlib.AsyncExitStack() as stack:
        kept = await stack.enter_async_context(Client.connect(rig.address, CALLER))
        await kept.send(request())
        assert (await kept.answer()).status == 200
        silent = await stack.enter_async_context(Client.connect(rig.address))
        await eventually(lambda: rig.listener.handshakes() == 1)
        await rig.hello()
        assert await closed(silent) == b""
        await kept.send(request())
        assert (await kept.answer()).status == 200, "a connection never gives way"


async def test_handshakes_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HANDSHAKES", 3)
    async with (
        listening(head=60.0) as rig,
        contextlib.AsyncExitStack() as stack,
    ):
        silent = [await stack.enter_async_context(Client.connect(rig.address)) for _ in range(3)]
        await eventually(lambda: rig.listener.handshakes() == 3)
        assert rig.handshakes == [], "three are within it"
        silent.append(await stack.enter_async_context(Client.connect(rig.address)))
        assert await closed(silent[0]) == b""
        assert rig.listener.handshakes() == 3
        await rig.hello()


async def test_without_an_identity_nobody_is_let_in() -> None:
    async with listening() as rig:
        rig.identity.current = None
        async with Client.connect(rig.address) as client:
            assert await closed(client) == b""
        assert (rig.handshakes, rig.terminator.snapshots) == ([], [])
        rig.identity.current = OURS
        await rig.hello()


async def test_a_handshake_has_its_time() -> None:
    async with listening(head=0.2) as rig:
        async with Client.connect(rig.address) as silent:
            await rig.hello()  # who is silent keeps nobody waiting
            assert await closed(silent) == b""
        await eventually(lambda: rig.handshakes == ["ok", "failed"])
        assert not rig.listener._handshakes


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 64, b""])
async def test_what_is_not_tls_fails(said: bytes) -> None:
    async with listening() as rig:
        async with Client.connect(rig.address) as client:
            if said:
                await client.send(said)
            else:
                client.writer.write_eof()
            assert b"HTTP" not in await closed(client)
        await eventually(lambda: rig.handshakes == ["failed"])
        await rig.hello()


async def test_a_caller_of_another_kms_fails_in_the_handshake() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    Kms.create(b"another").issue(APP_B).load_into(context)
    async with listening() as rig:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await rig.hello(context)
        await eventually(lambda: rig.handshakes == ["failed"])
        assert not rig.service.connections


async def test_stop_lets_handshakes_in_progress_go_on() -> None:
    async with listening() as rig, Client.connect(rig.address) as client:
        await eventually(lambda: rig.listener.handshakes() == 1)
        rig.listeners.stop("inbound")
        await client.writer.start_tls(CALLER, server_hostname="x")
        await client.send(request())
        assert (await client.answer()).status == 200
        async with Client.connect(rig.address) as late:  # the kernel's queue takes it, nobody else
            await client.send(request())
            assert (await client.answer()).status == 200
            assert len(rig.terminator.snapshots) == 1
            late.reset()


async def test_abort_closes_what_has_not_begun_its_handshake() -> None:
    async with listening(head=60.0) as rig:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        rig.listener.take(ours)
        rig.listener.abort()
        assert theirs.recv(1) == b"", "the loop had no turn yet"
        theirs.close()


async def test_who_has_waited_long_for_a_request_gives_way() -> None:
    async with (
        listening(max_connections=3, head=0.1) as rig,
        contextlib.AsyncExitStack() as stack,
    ):
        quiet = [
            await stack.enter_async_context(Client.connect(rig.address, CALLER)) for _ in range(3)
        ]
        for one in quiet:
            await one.send(request())
            assert (await one.answer()).status == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await rig.hello()
        await asyncio.sleep(0.15)  # longer than a head may take
        await quiet[0].send(request())
        assert (await quiet[0].answer()).status == 200
        await rig.hello()
        assert await closed(quiet[1]) == b""
        for one in (quiet[0], quiet[2]):
            await one.send(request())
            assert (await one.answer()).status == 200


async def test_abort_gives_up_handshakes_in_progress() -> None:
    async with listening(head=60.0) as rig, Client.connect(rig.address) as client:
        await eventually(lambda: rig.listener.handshakes() == 1)
        rig.listener.abort()
        assert await closed(client) == b""
        await eventually(lambda: not rig.listener.handshakes())
        await rig.hello()


async def test_a_full_backlog_is_not_taken_in_one_turn() -> None:
    rig = Rig(max_connections=100)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(Client.connect(rig.address))
        rig.start()
        most, before = 0, 0
        while before < 20:
            await asyncio.sleep(0)
            now = rig.listener.handshakes()
            most, before = max(most, now - before), now
        assert most <= 2, "others had their turns in between"
        rig.listeners.abort()
        rig.listener.abort()
        await eventually(lambda: not rig.listener.handshakes())
    rig.worker.close()
    rig.sock.close()

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import pytest
from tests.identities import APP_A, APP_B, FakeIdentity, snapshot_of
from tests.integration.harness import Wire, eventually, origin

from dstack_mesh.errors import (
    ConnectFailed,
    ConnectTimeout,
    IdentityUnavailable,
    MeshError,
    PeerAppIdMismatch,
    PeerRejectedUs,
    PeerUntrusted,
    TlsFailed,
    UpstreamClosed,
)
from dstack_mesh.model import TcpAddress
from dstack_mesh.outbound.connect import MeshConnector
from dstack_mesh.outbound.target import Endpoint
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.relay.worker import Worker
from dstack_mesh.sim.client_hello import server_name
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.odd import Kind, impostor_chain

NAME = f"{APP_B}-443s.apps.example"
KMS = Kms.create(b"connect")
OURS = snapshot_of(KMS, APP_A, generation=7)
OURS_12 = snapshot_of(KMS, APP_A, min_version=ssl.TLSVersion.TLSv1_2)


class Rig:
    """A connector of app A to app B, and what it told."""

    def __init__(
        self,
        address: TcpAddress,
        *,
        name: str | None = NAME,
        timeout: float = 10.0,
        identity: FakeIdentity | None = None,
    ) -> None:
        self.gateway_failures = 0
        self.handshakes: list[str] = []
        self.identity = identity or FakeIdentity(OURS)
        self.connector = MeshConnector(
            Endpoint(address, name, APP_B),
            self.identity,  # type: ignore[arg-type]
            timeout,
            self._gateway_failed,
            self.handshakes.append,
        )
        self.worker = Worker(asyncio.get_running_loop(), Timeouts())
        self.lane = Lane(self.worker, self.connector)

    def _gateway_failed(self) -> None:
        self.gateway_failures += 1

    async def connect(self) -> Upstream:
        async with asyncio.timeout(15):
            return await self.connector.connect(self.lane)

    async def fails(self, error: type[MeshError]) -> str:
        """Connect, which must fail in this way; give the error's detail."""
        with pytest.raises(MeshError) as caught:
            await self.connect()
        assert type(caught.value) is error, caught.value
        assert self.worker.upstreams == set(), "nothing may be used"
        return caught.value.detail

    @property
    def told(self) -> tuple[list[str], int]:
        return self.handshakes, self.gateway_failures


Make = Callable[..., Rig]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    rigs: list[Rig] = []

    def one(address: TcpAddress, **said: object) -> Rig:
        rigs.append(Rig(address, **said))  # type: ignore[arg-type]
        return rigs[-1]

    yield one
    for rig in rigs:
        upstreams = list(rig.worker.upstreams)
        rig.worker.close()
        await eventually(lambda gone=upstreams: all(each.gone for each in gone))


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count of names, no paths needed


@contextmanager
def refusing() -> Iterator[TcpAddress]:
    """Give an address that refuses, and that nobody else can take meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield TcpAddress("127.0.0.1", held.getsockname()[1])


@asynccontextmanager
async def unanswering() -> AsyncIterator[TcpAddress]:
    """Give an address where a connection comes about never: the queue of its listener is full."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            try:
                async with asyncio.timeout(0.2):
                    await loop.sock_connect(client, address)
            except TimeoutError:
                break
        else:
            pytest.fail("the queue does not fill")
        yield TcpAddress(*address)


async def silent(wire: Wire) -> None:
    await wire.to_end()


def then(last: Callable[[Wire], Awaitable[None] | None]) -> Callable[[Wire], Awaitable[None]]:
    """Read the ClientHello, then do this."""

    async def serve(wire: Wire) -> None:
        await wire.read()
        done = last(wire)
        if done is not None:
            await done

    return serve


# Connections that may be used


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_target_that_is_who_was_asked_for(make: Make, version: ssl.TLSVersion) -> None:
    with Impostor(KMS.issue(APP_B), client_ca_pem=KMS.root_pem, max_version=version) as target:
        rig = make(target.address, identity=FakeIdentity(OURS_12))
        upstream = await rig.connect()
        assert upstream.peer is not None
        assert upstream.peer.app_id == APP_B
        assert upstream.not_after == upstream.peer.not_after
        assert rig.worker.upstreams == {upstream}
        assert rig.told == (["ok"], 0)
        await asyncio.to_thread(target.wait_for_handshakes, 1)
        assert target.application_bytes == 0, "who connects sends nothing by itself"


async def test_a_connection_belongs_to_the_identity_it_was_made_under(make: Make) -> None:
    with Impostor(KMS.issue(APP_B)) as target:
        rig = make(target.address)
        upstream = await rig.connect()
        assert upstream.generation == 7 == rig.connector.generation()
        rig.identity.current = snapshot_of(KMS, APP_A, generation=8)
        assert rig.connector.generation() == 8
        assert not upstream.usable(rig.worker.loop.time(), rig.connector.generation())
        rig.identity.current = None
        assert not upstream.usable(rig.worker.loop.time(), rig.connector.generation())


@pytest.mark.parametrize("name", [NAME, "gateway.example", None])
async def test_the_server_name_is_the_endpoints(make: Make, name: str | None) -> None:
    async with origin(then(lambda _: None)) as (target, address):
        await make(address, name=name).fails(TlsFailed)
        assert server_name(target.received) == name


async def test_sessions_are_resumed_under_one_identity_of_ours(make: Make) -> None:
    with Impostor(KMS.issue(APP_B), answer=lambda _: b"x") as target:
        rig = make(target.address)
        for _ in range(3):
            upstream = await rig.connect()
            upstream.write(b"x")  # its tickets come before the answer
            await eventually(lambda one=upstream: one.gone or one.transport.is_closing())
        await asyncio.to_thread(target.wait_for_handshakes, 3)
        assert target.resumed == 2
        rig.identity.current = snapshot_of(KMS, APP_A, generation=8)
        await rig.connect()
        await asyncio.to_thread(target.wait_for_handshakes, 4)
        assert target.resumed == 2


async def test_no_session_of_tls_1_2_is_resumed(make: Make) -> None:
    old = ssl.TLSVersion.TLSv1_2
    with Impostor(KMS.issue(APP_B), max_version=old, answer=lambda _: b"x") as target:
        rig = make(target.address, identity=FakeIdentity(OURS_12))
        for _ in range(3):
            upstream = await rig.connect()
            upstream.write(b"x")
            await eventually(lambda one=upstream: one.gone or one.transport.is_closing())
        assert target.resumed == 0


# Connections that may not


async def test_without_an_identity_nobody_is_called(make: Make) -> None:
    with Impostor(KMS.issue(APP_B)) as target:
        rig = make(target.address, identity=FakeIdentity(None))
        await rig.fails(IdentityUnavailable)
        assert (rig.told, target.connections) == (([], 0), 0)


async def test_a_refused_connection(make: Make) -> None:
    with refusing() as address:
        rig = make(address)
        detail = await rig.fails(ConnectFailed)
    assert NAME in detail
    assert str(address) in detail
    assert "refused" in detail.lower()
    assert rig.told == ([], 1), "the gateway may have moved"


async def test_a_name_that_does_not_resolve(make: Make) -> None:
    rig = make(TcpAddress("no-such-host.invalid", 443))
    assert "does not resolve" in await rig.fails(ConnectFailed)
    assert rig.told == ([], 1)


async def test_a_connection_that_does_not_come_about(make: Make) -> None:
    async with unanswering() as address:
        before = descriptors()
        rig = make(address, timeout=0.1)
        detail = await rig.fails(ConnectTimeout)
        assert "the TCP connection" in detail
        assert "0.1 s" in detail
        assert "MESH_CONNECT_TIMEOUT" in detail
        assert rig.told == ([], 1)
        assert descriptors() == before


async def test_a_peer_that_is_silent_in_the_handshake(make: Make) -> None:
    async with origin(silent) as (target, address):
        rig = make(address, timeout=0.15)
        detail = await rig.fails(ConnectTimeout)
        assert "the TLS handshake" in detail
        assert NAME in detail
        assert rig.told == (["connect_timeout"], 0), "the gateway itself did answer"
        await eventually(lambda: target.wires[0].ended)


async def test_a_peer_that_is_not_tls(make: Make) -> None:
    answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"
    async with origin(then(lambda wire: wire.send(answer))) as (target, address):
        rig = make(address)
        detail = await rig.fails(TlsFailed)
        assert "does not speak TLS" in detail
        assert "knows no such app" not in detail
        assert rig.told == (["tls_failed"], 0)
        assert b"HTTP/1.1" not in target.received


@pytest.mark.parametrize("ending", ["finish", "reset"])
async def test_a_gateway_that_ends_the_connection(make: Make, ending: str) -> None:
    async with origin(then(lambda wire: getattr(wire, ending)())) as (_, address):
        rig = make(address)
        detail = await rig.fails(TlsFailed)
        assert "knows no such app" in detail
        assert rig.told == (["tls_failed"], 0)


async def test_no_common_version(make: Make) -> None:
    with Impostor(KMS.issue(APP_B), max_version=ssl.TLSVersion.TLSv1_2) as target:
        rig = make(target.address)
        assert "version" in await rig.fails(TlsFailed)
        assert rig.told == (["tls_failed"], 0)


async def test_another_app_of_the_mesh(make: Make) -> None:
    with Impostor(KMS.issue(APP_A)) as target:
        rig = make(target.address)
        detail = await rig.fails(PeerAppIdMismatch)
        assert APP_A in detail
        assert APP_B in detail
        assert rig.told == (["peer_app_id_mismatch"], 0)
        await asyncio.to_thread(target.wait, lambda: target.closed == 1)
        assert target.application_bytes == 0


@pytest.mark.parametrize(
    "kind", [Kind.OTHER_KMS, Kind.EXPIRED, Kind.NO_APP_ID, Kind.APP_CA_OF_OTHER_APP]
)
async def test_a_chain_that_does_not_hold(make: Make, kind: Kind) -> None:
    with Impostor(impostor_chain(KMS, kind, APP_B, APP_A)) as target:
        rig = make(target.address)
        assert NAME in await rig.fails(PeerUntrusted)
        assert rig.told == (["peer_untrusted"], 0)
        await asyncio.to_thread(target.wait, lambda: target.closed or target.failures)
        assert target.application_bytes == 0


async def test_a_target_that_refuses_us_in_the_handshake(make: Make) -> None:
    stranger = Kms.create(b"another")
    with Impostor(
        KMS.issue(APP_B), client_ca_pem=stranger.root_pem, max_version=ssl.TLSVersion.TLSv1_2
    ) as target:
        rig = make(target.address, identity=FakeIdentity(OURS_12))
        assert "refused" in await rig.fails(PeerRejectedUs)
        assert rig.told == (["peer_rejected_us"], 0)


async def test_a_target_that_refuses_us_after_the_handshake(make: Make) -> None:
    """TLS 1.3: our side of the handshake is done before the target has seen our certificate."""
    stranger = Kms.create(b"another")
    with Impostor(KMS.issue(APP_B), client_ca_pem=stranger.root_pem) as target:
        rig = make(target.address)
        upstream = await rig.connect()
        await eventually(lambda: upstream.gone)
        error = rig.connector.lost(upstream.failure)
        assert type(error) is PeerRejectedUs, error
        assert NAME in error.detail
        assert rig.worker.upstreams == set()


@pytest.mark.parametrize("exc", [None, ConnectionResetError("reset"), ssl.SSLError("odd")])
async def test_a_connection_lost_before_an_answer(make: Make, exc: Exception | None) -> None:
    error = make(TcpAddress("127.0.0.1", 1)).connector.lost(exc)
    assert type(error) is UpstreamClosed
    assert NAME in error.detail


async def test_an_endpoint_is_named_by_its_address_where_it_has_no_name(make: Make) -> None:
    with refusing() as address:
        detail = await make(address, name=None).fails(ConnectFailed)
    assert f"no connection to {address}:" in detail


# Descriptors


async def test_nothing_is_left_of_handshakes_that_time_out(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # its kernel accepts, nobody reads
        rig = make(TcpAddress(*listener.getsockname()), timeout=0.05)
        await rig.fails(ConnectTimeout)
        before = descriptors()
        for _ in range(5):
            await rig.fails(ConnectTimeout)
        await eventually(lambda: descriptors() <= before)


async def test_nothing_is_left_of_handshakes_that_are_cancelled(make: Make) -> None:
    async with origin(silent) as (target, address):
        rig = make(address)
        for count in range(1, 6):
            task = asyncio.create_task(rig.connect())
            # The ClientHello is there, so the handshake is under way.
            await eventually(lambda n=count: len(target.wires) == n and target.wires[-1].received)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await eventually(lambda: target.wires[-1].ended)
        assert rig.told == ([], 0), "that nobody waits any more says nothing about the target"
        assert rig.worker.upstreams == set()


async def test_nothing_is_left_of_targets_that_are_not_trusted(make: Make) -> None:
    with Impostor(KMS.issue(APP_A)) as target:
        rig = make(target.address)
        await rig.fails(PeerAppIdMismatch)
        await asyncio.to_thread(target.wait, lambda: target.closed == 1)
        before = descriptors()
        for count in range(2, 5):
            await rig.fails(PeerAppIdMismatch)
            await asyncio.to_thread(target.wait, lambda n=count: target.closed == n)
        await eventually(lambda: descriptors() <= before)

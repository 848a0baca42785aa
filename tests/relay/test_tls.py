"""Handshakes of both sides: done, refused, given up, and what each of them is told."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest
from tests.identity.conftest import Kms
from tests.identity.conftest import kms as kms
from tests.relay.tls_memory import IdleLoop, Raw
from tests.relay.tls_scene import (
    LOOPS,
    SIDES,
    TLS13,
    VERSIONS,
    Case,
    NewLoop,
    Recorder,
    Scene,
)

from dstack_mesh.identity import tls as contexts
from dstack_mesh.model import Role
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.tls import TlsTransport
from dstack_mesh.relay.worker import Worker

SHORT = Timeouts(linger=0.1)


@LOOPS
@VERSIONS
@SIDES
def test_two_apps_meet_and_each_knows_the_other(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        assert scene.ours.ssl_object.version() == {TLS13: "TLSv1.3"}.get(version, "TLSv1.2")
        role = Role.CALLER if server_side else Role.TARGET
        peer = contexts.VerifiedPeers(kms.root.root_spki).identify(scene.ours.ssl_object, role)
        assert peer is not None
        assert scene.settled == ([None] if server_side else [])
        await scene.peer_does(scene.peer.send, b"hello")
        await scene.until(lambda: scene.protocol.received == b"hello")
        scene.ours.write(b"bye")
        scene.ours.close()
        assert await scene.peer_does(scene.peer.read_to_end) == (b"bye", ["close-notify", "FIN"])
        scene.peer.sock.close()
        assert await scene.lost() is None
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, version, server_side).run(main)


@LOOPS
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["nothing", "a little"])
def test_a_caller_that_does_not_finish_is_timed_out(
    kms: Kms, new_loop: NewLoop, said: bytes
) -> None:
    async def main(scene: Scene) -> None:
        scene.peer.sock.sendall(said)
        await scene.accept(deadline=0.05)
        await scene.until(lambda: bool(scene.settled))
        (failure,) = scene.settled
        assert isinstance(failure, TimeoutError)
        assert contexts.describe_tls_failure(failure) == "the TLS handshake took too long"
        assert scene.ours.is_closing()

    Case(kms, new_loop, timeouts=SHORT).run(main)


@LOOPS
@SIDES
def test_a_handshake_in_time_has_no_deadline_left(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        assert scene.ours not in scene.worker.deadlines._watched

    Case(kms, new_loop, server_side=server_side).run(main)


@LOOPS
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["nothing", "a little"])
@SIDES
def test_a_peer_that_leaves_is_an_os_error(
    kms: Kms, new_loop: NewLoop, said: bytes, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        scene.peer.sock.sendall(said)
        scene.peer.sock.shutdown(socket.SHUT_WR)
        if server_side:
            await scene.accept()
            await scene.until(lambda: bool(scene.settled))
            failure: BaseException | None = scene.settled[0]
        else:
            with pytest.raises(OSError) as raised:
                await scene.open()
            failure = raised.value
        assert isinstance(failure, ConnectionResetError)
        assert "ended the connection" in contexts.describe_tls_failure(failure)
        assert scene.protocol.events == []

    Case(kms, new_loop, server_side=server_side).run(main)


@LOOPS
@SIDES
def test_a_peer_that_does_not_speak_tls_is_an_ssl_error(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        scene.peer.sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" + b"x" * 200_000)
        scene.peer.sock.shutdown(socket.SHUT_WR)
        failure: BaseException | None
        if server_side:
            await scene.accept()
            await scene.until(lambda: bool(scene.settled))
            failure = scene.settled[0]
        else:
            with pytest.raises(ssl.SSLError) as raised:
                await scene.open()
            failure = raised.value
        assert isinstance(failure, ssl.SSLError)
        assert contexts.describe_tls_failure(failure) == "the peer does not speak TLS"

    Case(kms, new_loop, server_side=server_side).run(main)


@LOOPS
@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["nothing", "a little"])
def test_a_handshake_that_we_give_up_has_failed(
    kms: Kms, new_loop: NewLoop, how: str, said: bytes
) -> None:
    async def main(scene: Scene) -> None:
        await scene.accept()
        scene.peer.sock.sendall(said)
        await asyncio.sleep(0.01)
        getattr(scene.ours, how)()
        assert scene.settled == [], "not before the connection is gone"
        getattr(scene.ours, how)()
        scene.ours.write(b"too late")
        await scene.until(lambda: bool(scene.settled))
        (failure,) = scene.settled
        assert isinstance(failure, ConnectionAbortedError)
        assert scene.protocol.events == []

    Case(kms, new_loop).run(main)


@LOOPS
def test_a_handshake_given_up_before_the_event_loop_has_it_ends_at_once(
    kms: Kms, new_loop: NewLoop
) -> None:
    async def main(scene: Scene) -> None:
        ours = TlsTransport(
            scene.worker, scene.protocol, no_session, scene.settled.append, server_side=True
        )
        assert ours.is_closing()
        ours.abort()
        await scene.worker.loop.connect_accepted_socket(ours.as_protocol, scene.sock)
        await scene.until(lambda: bool(scene.settled))
        assert isinstance(scene.settled[0], ConnectionAbortedError)
        assert await scene.peer_does(scene.peer.sock.recv, 1) == b""

    Case(kms, new_loop).run(main)


def no_session(incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> Any:
    raise ValueError("no such name")


@LOOPS
@SIDES
def test_where_no_session_can_be_made_the_handshake_has_failed(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    """A context made per connection needs a descriptor, and there may be none."""

    async def main(scene: Scene) -> None:
        ours = TlsTransport(
            scene.worker, scene.protocol, no_session, scene.settled.append, server_side=server_side
        )
        await scene.worker.loop.connect_accepted_socket(ours.as_protocol, scene.sock)
        scene.peer.sock.sendall(b"\x16")
        await scene.until(lambda: bool(scene.settled))
        assert str(scene.settled[0]) == "no such name"

    Case(kms, new_loop).run(main)


@LOOPS
@SIDES
def test_a_protocol_that_fails_at_the_start_ends_the_connection(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    """Whoever waits for the handshake is told, and not left waiting."""

    async def main(scene: Scene) -> None:
        def fail() -> None:
            raise ValueError("a fault")

        scene.protocol.on_made = fail
        peer = asyncio.create_task(asyncio.to_thread(scene.peer.connect))
        if server_side:
            await scene.accept()
            await peer
            await scene.until(lambda: bool(scene.settled))
            assert str(scene.settled[0]) == "a fault"
        else:
            with pytest.raises(ValueError, match="a fault"):
                await scene.open()
            await peer
        assert str(await scene.lost()) == "a fault"
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, server_side=server_side).run(main, faults=1)


class GreedySession:
    """A session that is never done, and remembers what it was given at a time."""

    def __init__(self, incoming: ssl.MemoryBIO) -> None:
        self._sslobj = self
        self._incoming = incoming
        self.given: list[int] = []

    def do_handshake(self) -> None:
        self.given.append(self._incoming.pending)
        self._incoming.read()
        raise ssl.SSLWantReadError


def test_a_handshake_swells_no_buffer(kms: Kms) -> None:
    """OpenSSL's buffers never shrink; whoever has no certificate may send as much in a read."""
    worker = Worker(IdleLoop(), Timeouts())
    ours = TlsTransport(
        worker,
        Recorder(),
        lambda incoming, _: GreedySession(incoming),  # type: ignore[arg-type, return-value]
        lambda error: None,
        server_side=True,
    )
    ours.connection_made(Raw())  # type: ignore[arg-type]
    ours.data_received(bytes(256_000))
    given = ours.ssl_object.given
    assert sum(given) == 256_000
    assert max(given) <= 32 * 1024

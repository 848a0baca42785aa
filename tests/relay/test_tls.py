"""Handshakes of both sides: done, refused, given up, and what each of them is told."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import struct
import threading
from typing import Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.identity.conftest import Issued, Kms, issue
from tests.identity.conftest import kms as kms
from tests.relay.tls_scene import (
    DEADLINE,
    LOOPS,
    SIDES,
    TLS13,
    VERSIONS,
    Case,
    NewLoop,
    Scene,
    bare_context,
)

from dstack_mesh.identity import tls as contexts
from dstack_mesh.model import Role
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.tls import TlsTransport, open_tls

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


WRONG = ("foreign KMS", "self-signed", "expired", "other role", "leaf as CA")


def wrong_callers(kms: Kms) -> dict[str, tuple[Issued, str]]:
    """For each way in which OpenSSL refuses a caller: its chain, and the alert that fits."""
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    return {
        "foreign KMS": (Kms().leaf(), "TLSV1_ALERT_DECRYPT_ERROR"),
        "self-signed": (issue(None, "localhost", []), "TLSV1_ALERT_UNKNOWN_CA"),
        "expired": (kms.leaf(not_after=yesterday), "SSLV3_ALERT_CERTIFICATE_EXPIRED"),
        "other role": (
            kms.leaf(eku=[ExtendedKeyUsageOID.SERVER_AUTH]),
            "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        ),
        "leaf as CA": (kms.leaf(issuer=kms.leaf()), "TLSV1_ALERT_UNKNOWN_CA"),
    }


@LOOPS
@VERSIONS
@pytest.mark.parametrize("who", WRONG)
def test_a_caller_that_openssl_refuses_is_shown_the_alert(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, who: str
) -> None:
    """Though it has sent a request already, more than sockets hold."""
    wrong, alert = wrong_callers(kms)[who]
    caller = bare_context(wrong, version, server_side=False)

    def call(scene: Scene) -> str | None:
        try:
            with caller.wrap_socket(scene.peer.sock) as sock:
                sock.sendall(b"x" * 100_000)
                while sock.recv(1024):
                    pass
        except ssl.SSLError as error:
            return error.reason
        return None

    async def main(scene: Scene) -> None:
        calling = asyncio.create_task(asyncio.to_thread(call, scene))
        await scene.accept()
        assert await calling == alert
        await scene.until(lambda: bool(scene.settled))
        assert isinstance(scene.settled[0], ssl.SSLCertVerificationError)
        assert scene.protocol.events == [], "it hears of no handshake that fails"

    Case(kms, new_loop, version).run(main)


@LOOPS
@VERSIONS
def test_a_target_that_openssl_refuses_is_shown_the_alert(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion
) -> None:
    async def main(scene: Scene) -> None:
        serving = asyncio.create_task(asyncio.to_thread(refused, scene))
        with pytest.raises(ssl.SSLCertVerificationError):
            await scene.open()
        assert await serving == "TLSV1_ALERT_DECRYPT_ERROR"
        assert scene.protocol.events == []

    def refused(scene: Scene) -> str | None:
        with pytest.raises(ssl.SSLError) as failure:
            scene.peer.connect()
        return failure.value.reason

    Case(kms, new_loop, version, server_side=False, caller=Kms().leaf()).run(main)


@LOOPS
@pytest.mark.parametrize("flooding", [False, True], ids=["silent", "flooding"])
def test_a_refused_caller_that_stays_is_cut_off_and_counts_until_then(
    kms: Kms, new_loop: NewLoop, flooding: bool
) -> None:
    cut_off = threading.Event()

    def stay(scene: Scene) -> None:
        scene.peer.connect()
        while flooding:
            try:
                scene.peer.send(bytes(16_384))
            except ConnectionError:
                return
        assert cut_off.wait(DEADLINE)

    async def main(scene: Scene) -> None:
        staying = asyncio.create_task(asyncio.to_thread(stay, scene))
        await scene.accept()
        await scene.until(lambda: scene.ours._state == 3)
        began = scene.worker.clock()
        assert scene.settled == []
        await scene.until(lambda: bool(scene.settled))
        assert scene.worker.clock() - began >= 0.05
        assert isinstance(scene.settled[0], ssl.SSLCertVerificationError)
        assert len(scene.settled) == 1
        assert scene.protocol.events == []
        cut_off.set()
        await staying

    Case(kms, new_loop, caller=Kms().leaf(), timeouts=SHORT).run(main)


@LOOPS
def test_our_client_tells_of_a_refusal_at_once_and_goes_when_the_time_is_over(
    kms: Kms, new_loop: NewLoop
) -> None:
    """The target stays; whoever waits for the connection does not wait for that."""

    def stay(scene: Scene) -> bytes:
        with pytest.raises(ssl.SSLError):
            scene.peer.connect()
        return scene.peer.sock.recv(100)

    async def main(scene: Scene) -> None:
        staying = asyncio.create_task(asyncio.to_thread(stay, scene))
        with pytest.raises(ssl.SSLCertVerificationError):
            await scene.open()
        assert await staying == b""

        def reset() -> bool:
            try:
                scene.peer.sock.send(b"x")
            except ConnectionError:
                return True
            return False

        await scene.until(reset)

    Case(kms, new_loop, server_side=False, caller=Kms().leaf(), timeouts=SHORT).run(main)


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
def test_a_server_name_that_is_none_is_raised_and_not_waited_for(
    kms: Kms, new_loop: NewLoop
) -> None:
    async def main(scene: Scene) -> None:
        with pytest.raises(ValueError, match="label empty"):
            await open_tls(scene.worker, scene.sock, scene.protocol, scene.context, ".x")
        assert await scene.peer_does(scene.peer.sock.recv, 1) == b""
        assert scene.sock.fileno() == -1, "it would close another's descriptor one day"

    Case(kms, new_loop, server_side=False).run(main)


def ended(sock: socket.socket) -> bool:
    """Read to the end; raises `TimeoutError` where there is none."""
    while sock.recv(1024):
        pass
    return True


@LOOPS
@pytest.mark.parametrize("after", [1, 2, 3, 10])
def test_who_is_cancelled_lets_go_of_the_socket(kms: Kms, new_loop: NewLoop, after: int) -> None:
    """At each turn of the loop up to where it waits for the target.

    A `sock` that still had the number of a closed descriptor would close another's one day.
    """

    async def main(scene: Scene) -> None:
        opening = asyncio.create_task(scene.open())
        for _ in range(after):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await asyncio.sleep(0.01)
        assert await scene.peer_does(ended, scene.peer.sock)
        assert scene.sock.fileno() == -1
        assert scene.sock.fileno() == -1

    Case(kms, new_loop, server_side=False).run(main)


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


@LOOPS
@VERSIONS
def test_a_caller_that_is_gone_before_the_alert_is_still_refused(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion
) -> None:
    def leave(scene: Scene) -> None:
        scene.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(ssl.SSLError):  # TLS 1.2 has it wait, and read the alert
            scene.peer.connect()
        scene.peer.sock.close()

    async def main(scene: Scene) -> None:
        leaving = asyncio.create_task(scene.peer_does(leave, scene))
        await scene.accept()
        await leaving
        await scene.until(lambda: bool(scene.settled))
        assert isinstance(scene.settled[0], OSError)
        assert len(scene.settled) == 1

    Case(kms, new_loop, version, caller=Kms().leaf()).run(main)

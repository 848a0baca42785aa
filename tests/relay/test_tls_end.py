"""The ends of TLS connections: in order, bare, broken, by either side; each is told once."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading

import pytest
from tests.identity.conftest import Kms
from tests.identity.conftest import kms as kms
from tests.relay.tls_scene import (
    DEADLINE,
    LOOPS,
    SIDES,
    VERSIONS,
    Case,
    NewLoop,
    Scene,
    pattern,
)

from dstack_mesh.relay.deadlines import Timeouts

SHORT = Timeouts(linger=0.1)
RESET = struct.pack("ii", 1, 0)
IN_ORDER = ["close-notify", "FIN"]


# The peer ends it.


@LOOPS
@VERSIONS
@SIDES
@pytest.mark.parametrize("size", [0, 10, 100_000], ids=["alone", "with data", "with much data"])
def test_a_close_notify_is_an_end_in_order_and_told_once(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool, size: int
) -> None:
    """In the same read as the data before it, too; and it is answered by ours."""
    data = pattern(size)

    async def main(scene: Scene) -> None:
        await scene.meet()
        sealed = scene.peer.seal(data) if data else b""
        await scene.peer_does(scene.peer.sock.sendall, sealed + scene.peer.goodbye())
        assert await scene.lost() is None
        assert scene.protocol.received == data
        assert scene.protocol.events == ["made", "eof", "lost"]
        assert await scene.peer_does(bare_end, scene.peer.sock) == "FIN"

    Case(kms, new_loop, version, server_side).run(main)


def bare_end(sock: socket.socket) -> str:
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        return "RST"
    return "FIN"


@LOOPS
@VERSIONS
@SIDES
@pytest.mark.parametrize("cut", [0, 3], ids=["after a record", "within a record"])
def test_a_bare_end_is_none_in_order(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool, cut: int
) -> None:
    """A response that has no length of its own must not look whole (RFC 9112 9.8)."""

    async def main(scene: Scene) -> None:
        await scene.meet()
        sealed = scene.peer.seal(b"hello") + scene.peer.seal(b"more")[:cut]
        await scene.peer_does(scene.peer.sock.sendall, sealed)
        await scene.until(lambda: scene.protocol.received == b"hello")
        scene.peer.sock.shutdown(socket.SHUT_WR)
        assert await scene.lost() is None
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, version, server_side).run(main)


@LOOPS
@SIDES
def test_a_reset_is_told_as_one(kms: Kms, new_loop: NewLoop, server_side: bool) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        scene.peer.sock.close()
        assert isinstance(await scene.lost(), ConnectionResetError)
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, server_side=server_side).run(main)


@LOOPS
@VERSIONS
@SIDES
@pytest.mark.parametrize("size", [10, 100_000], ids=["little", "much"])
def test_what_was_whole_before_a_broken_record_is_delivered_and_then_the_failure(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool, size: int
) -> None:
    """And the peer is told what was wrong (RFC 8446 6.2).

    Whoever answers the data cannot any more, and what that gives is not the failure.
    """
    data = pattern(size)

    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.protocol.on_data = lambda _: scene.ours.write(b"yes")
        broken = bytearray(scene.peer.seal(data) + scene.peer.seal(b"more"))
        broken[-1] ^= 1
        await scene.peer_does(scene.peer.sock.sendall, bytes(broken))
        failure = await scene.lost()
        assert isinstance(failure, ssl.SSLError)
        assert failure.reason == "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
        assert scene.protocol.received == data
        assert scene.protocol.events == ["made", "lost"]
        alert = ["SSLV3_ALERT_BAD_RECORD_MAC"]
        said, ends = await scene.peer_does(scene.peer.read_to_end)
        assert said == b"yes" * (len(scene.protocol.pieces) - 1), "to what came in earlier reads"
        assert ends == alert

    Case(kms, new_loop, version, server_side).run(main)


@LOOPS
def test_an_alert_after_the_handshake_is_told_as_what_ended_it(kms: Kms, new_loop: NewLoop) -> None:
    """With TLS 1.3 a target refuses our certificate when our side is done."""

    async def main(scene: Scene) -> None:
        def refuse() -> None:
            with pytest.raises(ssl.SSLCertVerificationError):
                scene.peer.connect()
            scene.peer.sock.sendall(scene.peer.goodbye())

        refusing = asyncio.create_task(scene.peer_does(refuse))
        await scene.open()
        scene.ours.write(b"a request")
        failure = await scene.lost()
        await refusing
        assert isinstance(failure, ssl.SSLError)
        assert failure.reason == "TLSV1_ALERT_UNKNOWN_CA"
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, server_side=False, verifying=True).run(main)


@LOOPS
def test_an_alert_that_a_reset_follows_is_told_though_a_write_met_the_reset(
    kms: Kms, new_loop: NewLoop
) -> None:
    """Few servers wait for what a client sends them after they have refused it."""

    async def main(scene: Scene) -> None:
        judged, refused = threading.Event(), threading.Event()

        def refuse() -> None:
            with pytest.raises(ssl.SSLCertVerificationError):
                scene.peer.connect()
            judged.set()
            scene.peer.sock.recv(1, socket.MSG_PEEK)  # the request is here, and stays unread
            scene.peer.sock.sendall(scene.peer.goodbye())
            scene.peer.sock.close()
            refused.set()

        refusing = asyncio.create_task(scene.peer_does(refuse))
        await scene.open()
        assert judged.wait(DEADLINE)
        scene.ours.write(b"a request")
        assert refused.wait(DEADLINE), "and our side has read nothing meanwhile"
        scene.ours.write(b"its body")
        failure = await scene.lost()
        await refusing
        assert isinstance(failure, ssl.SSLError)
        assert failure.reason == "TLSV1_ALERT_UNKNOWN_CA"
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, server_side=False, verifying=True).run(main)


@LOOPS
@SIDES
def test_an_answer_that_a_reset_follows_is_read_by_a_client_though_a_write_met_the_reset(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    """A server would only begin what it cannot answer."""

    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.ours.write(b"never read")
        scene.peer.sock.recv(1, socket.MSG_PEEK)
        scene.peer.send(b"413")
        scene.peer.sock.close()
        scene.ours.write(b"more")
        assert isinstance(await scene.lost(), OSError)
        assert scene.protocol.received == (b"" if server_side else b"413")
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, server_side=server_side).run(main)


# Our side ends it.


@LOOPS
@VERSIONS
@SIDES
def test_closing_says_so_and_reads_over_what_still_comes(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool
) -> None:
    """A reset would destroy what the peer has not read yet (RFC 9112 9.6)."""
    answer = pattern(100_000)

    def act(scene: Scene) -> tuple[bytes, list[str]]:
        for _ in range(20):
            scene.peer.send(bytes(16_384))
        return scene.peer.read_to_end()

    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.ours.pause_reading()
        scene.ours.write(answer)
        scene.ours.close()
        assert scene.ours.is_closing()
        assert await scene.peer_does(act, scene) == (answer, IN_ORDER)
        scene.peer.sock.close()
        assert await scene.lost() is None
        assert scene.protocol.events == ["made", "lost"]
        assert scene.protocol.received == b""

    patient = Timeouts(linger=3 * DEADLINE)  # it is the peer's end that ends it, not the time
    Case(kms, new_loop, version, server_side, timeouts=patient).run(main)


@LOOPS
@SIDES
def test_closing_waits_for_a_slow_reader(kms: Kms, new_loop: NewLoop, server_side: bool) -> None:
    """Longer than for a silent one: there is still something to send."""
    answer = pattern(400_000)

    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.ours.write(answer)
        scene.ours.close()
        scene.ours.write(b"too late")
        await asyncio.sleep(0.4)
        assert scene.protocol.events == ["made"], "the time to linger is over, and it waits on"
        scene.ours.close()
        assert await scene.peer_does(scene.peer.read_to_end) == (answer, IN_ORDER)
        assert await scene.lost() is None, "cut off, when all is sent and it does not end its side"
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, server_side=server_side, timeouts=SHORT, small=True).run(main)


@LOOPS
def test_a_peer_that_has_finished_sending_still_gets_all(kms: Kms, new_loop: NewLoop) -> None:
    answer = pattern(400_000)

    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.ours.write(answer)
        scene.ours.close()
        scene.peer.sock.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.02)
        assert await scene.peer_does(scene.peer.read_to_end) == (answer, IN_ORDER)
        assert await scene.lost() is None

    Case(kms, new_loop, small=True).run(main)


@LOOPS
@SIDES
@pytest.mark.parametrize("closing", [False, True], ids=["open", "closing"])
def test_aborting_ends_it_at_once(
    kms: Kms, new_loop: NewLoop, server_side: bool, closing: bool
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.ours.write(pattern(400_000))
        if closing:
            scene.ours.close()
        scene.ours.abort()
        scene.ours.abort()
        scene.ours.write(b"too late")
        assert scene.ours.is_closing()
        assert scene.protocol.events == ["made"], "not from within the call"
        assert await scene.lost() is None
        _, ends = await scene.peer_does(scene.peer.read_to_end)
        assert "close-notify" not in ends, "what is missing must be seen to be"

    Case(kms, new_loop, server_side=server_side, small=True).run(main)


@LOOPS
@SIDES
@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_protocol_may_end_it_when_the_peer_does(
    kms: Kms, new_loop: NewLoop, server_side: bool, how: str
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.protocol.on_eof = lambda: getattr(scene.ours, how)()
        await scene.peer_does(scene.peer.sock.sendall, scene.peer.goodbye())
        scene.peer.sock.shutdown(socket.SHUT_WR)
        assert await scene.lost() is None
        assert scene.protocol.events == ["made", "eof", "lost"]

    Case(kms, new_loop, server_side=server_side).run(main)


@LOOPS
def test_a_protocol_may_answer_the_peers_end(kms: Kms, new_loop: NewLoop) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.protocol.on_eof = lambda: scene.ours.write(b"last words")

        def end() -> bytes:
            scene.peer.sock.sendall(goodbye)
            raw = b""
            while data := scene.peer.sock.recv(1000):
                raw += data
            return raw

        goodbye = scene.peer.goodbye()
        raw = await scene.peer_does(end)
        assert raw.count(b"\x17\x03\x03") == 3, "a ticket, the words, and our close-notify"
        await scene.lost()

    Case(kms, new_loop).run(main)

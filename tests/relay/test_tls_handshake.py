"""Callers that our server refuses: each sees why, and none stays for long."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import struct
import threading

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.identity.conftest import Issued, Kms, issue
from tests.identity.conftest import kms as kms
from tests.relay.tls_scene import DEADLINE, LOOPS, VERSIONS, Case, NewLoop, Scene, bare_context

from dstack_mesh.relay.deadlines import Timeouts

SHORT = Timeouts(linger=0.1)
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

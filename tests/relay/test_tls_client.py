"""Our client's side of TLS on a socket: refusing a target, names, letting go."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest
from tests.identity.conftest import Kms
from tests.identity.conftest import kms as kms
from tests.relay.tls_scene import LOOPS, VERSIONS, Case, NewLoop, Scene

from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.tls_client import open_tls

SHORT = Timeouts(linger=0.1)


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

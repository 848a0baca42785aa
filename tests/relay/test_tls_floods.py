"""What peers can have TLS do and hold: answers without end, and buffers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from tests.identity.conftest import Kms
from tests.identity.conftest import kms as kms
from tests.relay.tls_burst_server import BURST
from tests.relay.tls_memory import Both
from tests.relay.tls_scene import (
    DEADLINE,
    LOOPS,
    MIB,
    SIDES,
    TLS12,
    TLS13,
    VERSIONS,
    Case,
    NewLoop,
    Scene,
    bare_context,
)
from tests.tls import records, tls12, tls13
from tests.tls.records import SocketChannel
from tests.tls.tls13 import AlertReceived, Shown

from dstack_mesh.relay import tls

ROOT = Path(__file__).parents[2]
BOUND = MIB
NO_RENEGOTIATION = 100


_TICKET = 4
"""NewSessionTicket (RFC 8446 4.6.1)."""


class Asking13:
    """Asks for key updates (RFC 8446 4.6.3)."""

    def __init__(self, scene: Scene) -> None:
        channel = SocketChannel(scene.peer.sock)
        self.peer: tls13.Client | tls13.Server
        if scene.case.server_side:
            client = tls13.Client(channel)
            client.handshake(None)
            self.peer = client
            return
        leaf = scene.case.kms.leaf()
        server = tls13.Server(channel)
        server.read_client_hello()
        server.agree()
        server.show(server.flight(Shown(tuple(leaf.chain), leaf.key)))
        server.read_answer()
        self.peer = server

    def ask(self) -> bytes:
        assert self.peer.sending is not None
        asking = records.message(records.KEY_UPDATE, b"\1")
        sealed = self.peer.sealed(records.HANDSHAKE, asking)
        self.peer.sending = self.peer.sending.updated()
        return sealed

    def read_answers(self) -> int:
        """Read up to data; give how many answers came before it."""
        count = 0
        while True:
            kind, content = self.peer.read_record()
            if kind == records.APPLICATION_DATA:
                return count
            if content[0] == _TICKET:
                continue
            count += 1
            assert content == records.message(records.KEY_UPDATE, b"\0")
            assert self.peer.receiving is not None
            self.peer.receiving = self.peer.receiving.updated()


class Asking12:
    """Asks to renegotiate, which is refused by a warning each time (RFC 5746 4.5)."""

    def __init__(self, scene: Scene) -> None:
        channel = SocketChannel(scene.peer.sock)
        self.peer: tls12.Client | tls12.Server
        if scene.case.server_side:
            client = tls12.Client(channel)
            client.handshake(None)
            self.peer = client
            hello = records.Hello(suites=(records.ECDHE_ECDSA_AES_128_GCM_SHA256, tls12.SCSV))
            hello.extensions = records.usual_extensions(versions=(records.TLS_1_2,))
            self._again = hello.message()
            return
        leaf = scene.case.kms.leaf()
        server = tls12.Server(channel)
        server.read_client_hello()
        server.show(Shown(tuple(leaf.chain), leaf.key))
        self.peer = server
        self._again = records.message(records.HELLO_REQUEST, b"")

    def ask(self) -> bytes:
        assert self.peer.sending is not None
        return self.peer.sending.seal(records.HANDSHAKE, self._again)

    def read_answers(self) -> int:
        """Read up to data; give how many answers came before it."""
        for count in itertools.count():
            try:
                kind, _ = self.peer.read_record()
            except AlertReceived as alert:
                kind = alert.code
            if kind == records.APPLICATION_DATA:
                return count
            assert kind == NO_RENEGOTIATION
        raise AssertionError


def asking(scene: Scene) -> Asking12 | Asking13:
    return Asking13(scene) if scene.case.version is TLS13 else Asking12(scene)


async def begin(scene: Scene) -> Asking12 | Asking13:
    peer = asyncio.create_task(scene.peer_does(asking, scene))
    if scene.case.server_side:
        await scene.accept()
    else:
        await scene.open()
    return await peer


@VERSIONS
@SIDES
def test_a_peer_that_has_tls_answer_it_and_reads_nothing_is_cut(
    kms: Kms,
    version: ssl.TLSVersion,
    server_side: bool,
) -> None:
    most: list[int] = [0]

    def flood(scene: Scene, peer: Asking12 | Asking13) -> None:
        for _ in range(1_500):
            try:
                scene.peer.sock.sendall(b"".join(peer.ask() for _ in range(100)))
            except ConnectionError:
                return
            most.append(scene.ours.get_write_buffer_size())
        raise AssertionError("nobody stopped it")

    async def main(scene: Scene) -> None:
        peer = await begin(scene)
        flooding = asyncio.create_task(scene.peer_does(flood, scene, peer))
        failure = await scene.lost()
        await flooding
        assert isinstance(failure, ssl.SSLError)
        assert "does not read" in str(failure)
        assert max(most) < 2 * BOUND
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, uvloop.new_event_loop, version, server_side, small=True).run(main)


@LOOPS
@VERSIONS
@SIDES
def test_a_peer_that_has_tls_answer_it_and_reads_is_served(
    kms: Kms,
    new_loop: NewLoop,
    version: ssl.TLSVersion,
    server_side: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may ask for as much as it likes, more than could wait."""
    monkeypatch.setattr(tls, "_MAX_UNREAD_BYTES", 256)

    def ask(scene: Scene, peer: Asking12 | Asking13) -> int:
        answers = 0
        for _ in range(100):
            scene.peer.sock.sendall(peer.ask() + peer.ask())
            peer.peer.send(records.APPLICATION_DATA, b"hello")
            answers += peer.read_answers()
        return answers

    async def main(scene: Scene) -> None:
        scene.protocol.on_data = lambda data: scene.protocol.transport.write(data)
        answers = await scene.peer_does(ask, scene, await begin(scene))
        assert answers >= 50
        assert scene.protocol.received == b"hello" * 100

    Case(kms, new_loop, version, server_side).run(main)


def test_what_is_to_be_answered_goes_out_though_nothing_is_read_or_written(kms: Kms) -> None:
    """And not what was read over once we have closed."""
    both = Both(kms, TLS12, server_side=False)
    assert both.raw.sent == b""
    both.ours.close()
    sent = bytes(both.raw.sent)
    both.say(both.seal(b"late"))
    assert both.raw.sent == sent


# Memory.


@contextlib.contextmanager
def measured_server() -> Iterator[tuple[int, Callable[[], int]]]:
    """Give the port of a server in a process of its own, and how to ask what it holds."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.relay.tls_burst_server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def resident() -> int:
            stdin.write("\n")
            stdin.flush()
            return int(stdout.readline())

        try:
            yield int(stdout.readline()), resident
        finally:
            child.kill()


def burst(sock: ssl.SSLSocket) -> None:
    sock.sendall(bytes(BURST))
    left = BURST
    while left:
        left -= len(sock.recv(65536))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_connection_that_is_idle_after_a_burst_holds_little() -> None:
    """Event loops' own TLS keeps 300 KB and more of each for as long as it lives."""
    context = bare_context(None, TLS13, server_side=False)
    with measured_server() as (port, resident), contextlib.ExitStack() as stack:

        def connect() -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
            return stack.enter_context(context.wrap_socket(plain))

        for _ in range(5):
            with connect() as warming:
                burst(warming)
        before = resident()
        for _ in range(200):
            burst(connect())
        each = (resident() - before) / 200
        assert each < 120_000, f"{each:.0f} bytes each"

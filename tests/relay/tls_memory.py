"""Our end of TLS over a transport in memory: a test says what each read holds."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any, cast

from tests.identity.conftest import Kms
from tests.relay.tls_scene import TLS12, Recorder, bare_context

from dstack_mesh.identity import tls as contexts
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.tls import TlsTransport
from dstack_mesh.relay.worker import Worker


class _Handle:
    def cancel(self) -> None:
        """Nothing is ever due."""


class _IdleLoop:
    """An event loop that never gets to what is due later."""

    def call_later(self, delay: float, callback: Any) -> _Handle:
        return _Handle()


def IdleLoop() -> asyncio.AbstractEventLoop:  # noqa: N802 - stands for the class
    return cast("asyncio.AbstractEventLoop", _IdleLoop())


class Raw:
    """What an event loop's plain transport is to us. `unread` is what the peer has not taken."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.unread = 0
        self.taken = 0
        """How much of what was sent the peer has read; the rest stays in the write buffer."""
        self.reading = True
        self.ended = False
        self.closed = False
        self.aborted = False
        self.broken = False
        """Whether to end its side is an error: the peer has reset the connection."""

    def write(self, data: bytes) -> None:
        assert not self.ended
        if self.closed:  # as uvloop's does once it has closed the handle
            raise RuntimeError("the handler is closed")
        self.sent += data

    def write_eof(self) -> None:
        if self.broken:
            raise OSError("not connected")
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.unread


class Both:
    """Both ends, after their handshake (unless not `shake`)."""

    def __init__(
        self,
        kms: Kms,
        version: ssl.TLSVersion,
        *,
        server_side: bool,
        pieces: int = 1 << 20,
        worker: Worker | None = None,
        shake: bool = True,
    ) -> None:
        """`pieces` is how many bytes of the peer's handshake come in one read."""
        self.worker = worker or Worker(IdleLoop(), Timeouts())
        self.protocol = Recorder()
        self.raw = Raw()
        self.settled: list[Exception | None] = []
        leaf = kms.leaf()
        make = contexts.server_context if server_side else contexts.client_context
        context = make(leaf.credentials, version)
        if version is TLS12:
            context.maximum_version = version
        self.ours = TlsTransport(
            self.worker,
            self.protocol,
            lambda incoming, outgoing: context.wrap_bio(incoming, outgoing, server_side),
            self.settled.append,
            server_side=server_side,
        )
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        other = bare_context(leaf, version, server_side=not server_side)
        self.peer = other.wrap_bio(self._incoming, self._outgoing, not server_side)
        self.ours.connection_made(cast("asyncio.BaseTransport", self.raw))
        if shake:
            self._shake(pieces)

    def _shake(self, pieces: int) -> None:
        for _ in range(6):
            with contextlib.suppress(ssl.SSLWantReadError):
                self.peer.do_handshake()
            said = self._outgoing.read()
            for at in range(0, len(said), pieces):
                self.ours.data_received(said[at : at + pieces])
            self._hear()
        assert self.protocol.events == ["made"]
        assert self.settled == [None]

    def _hear(self) -> None:
        self._incoming.write(bytes(self.raw.sent))
        self.raw.sent.clear()

    def seal(self, data: bytes) -> bytes:
        if data:
            self.peer.write(data)
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        with contextlib.suppress(ssl.SSLError):
            self.peer.unwrap()
        return self._outgoing.read()

    def say(self, *reads: bytes) -> None:
        for data in reads:
            if data:
                self.ours.data_received(data)

    def take(self) -> bytes:
        """Give what our protocol got since it was last asked."""
        got = bytes(self.protocol.received)
        self.protocol.received.clear()
        return got

    def heard(self) -> bytes:
        """Give what the peer can read of what our side has sent."""
        self._hear()
        found = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self.peer.read(65536):
                found += piece
        return found

"""The handshake of a TLS connection over a plain one, and how such a connection ends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final

from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.stream import StreamProtocol, left_unread
from dstack_mesh.relay.worker import Worker

Wrap = Callable[[ssl.MemoryBIO, ssl.MemoryBIO], ssl.SSLObject]
"""Makes a TLS session between what comes in and what goes out."""

Settled = Callable[[Exception | None], None]
"""Called once: with None, or with what the handshake failed by; a server's when all is gone."""

HANDSHAKE: Final = 0
OPEN: Final = 1
CLOSING: Final = 2
REFUSED: Final = 3
GONE: Final = 4


class TlsHandshake(StreamProtocol):
    """A protocol to the event loop, until the handshake is done; `TlsTransport` is what follows.

    The protocol on top hears of the connection then, and never of one that fails.
    """

    __slots__ = (
        "_failure",
        "_incoming",
        "_outgoing",
        "_protocol",
        "_raw",
        "_server_side",
        "_settled",
        "_sslobj",
        "_state",
        "_wrap",
        "deadline",
        "ssl_object",
        "worker",
    )

    def __init__(
        self,
        worker: Worker,
        protocol: StreamProtocol,
        wrap: Wrap,
        settled: Settled,
        *,
        server_side: bool,
        deadline: float = NEVER,
    ) -> None:
        """`deadline` is the handshake's, in the worker's time."""
        self.worker = worker
        self.deadline = deadline
        self.ssl_object: Any = None  # an `ssl.SSLObject`, once there is one
        self._protocol = protocol
        self._wrap = wrap
        self._settled: Settled | None = settled
        self._server_side = server_side
        self._state = HANDSHAKE
        self._failure: Exception | None = None
        self._raw: Any = None
        self._sslobj: Any = None
        self._incoming: Any = None
        self._outgoing: Any = None

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake; a server waits for the client's first bytes."""
        self._raw = transport
        if self._state != HANDSHAKE:  # given up before it began
            self._raw.abort()
            return
        if self.deadline != NEVER:
            self.worker.deadlines.watch(self)
        if not self._server_side and self._begin():
            self._shake_hands()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever still waits; a client first reads what a refusal may have said."""
        try:
            if not self._server_side and self._state in (HANDSHAKE, OPEN):
                last = left_unread(self._raw, exc)
                if last:
                    self.data_received(last)
        finally:
            self._lost(exc)

    def _lost(self, exc: Exception | None) -> None:
        state, self._state = self._state, GONE
        self.worker.deadlines.unwatch(self)
        failure = self._failure or exc
        # Settled before, unless the handshake failed, or `connection_made` did.
        self._settle(failure or ConnectionResetError("the peer ended it"))
        if state in (OPEN, CLOSING):
            self._protocol.connection_lost(failure)
        self._failure = None  # its traceback leads back to here

    def pause_writing(self) -> None:
        """Pass on what the event loop wishes."""
        if self._state in (OPEN, CLOSING):
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass on what the event loop wishes."""
        if self._state in (OPEN, CLOSING):
            self._protocol.resume_writing()

    # The handshake.

    def _begin(self) -> bool:
        """Tell whether there is a session to shake hands with."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self.ssl_object = self._wrap(self._incoming, self._outgoing)
        except Exception as error:  # raised on, it would be lost in the event loop
            self._give_up(error)
            return False
        # What `ssl.SSLObject` wraps has the same methods, and they cost no Python frame.
        self._sslobj = self.ssl_object._sslobj  # noqa: SLF001 - see above
        return True

    def _give_up(self, failure: Exception) -> None:
        self._state = REFUSED
        self._failure = failure
        self._raw.abort()

    def _shake_hands(self) -> None:
        try:
            self._sslobj.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except (ssl.SSLError, OSError) as error:
            self._refuse(error)
            return
        self._flush()
        self.worker.deadlines.unwatch(self)
        self.deadline = NEVER
        self._state = OPEN
        self.handshake_done()

    def _refuse(self, error: Exception) -> None:
        """Send the alert that OpenSSL has made, and give the peer the time to see it.

        A TLS 1.3 client sends its request before it can know of the refusal. Closing with that
        unread makes the kernel reset the connection, and a reset discards the alert.
        """
        self._state = REFUSED
        self._failure = error
        self._flush()
        self._finish_sending()
        if not self._server_side:  # a caller that stays costs what a handshake does, until it goes
            self._settle(error)

    def _settle(self, error: Exception | None) -> None:
        settled, self._settled = self._settled, None
        if settled is not None:
            settled(error)

    def handshake_done(self) -> None:
        """Let the protocol on top have the connection."""
        raise NotImplementedError

    # Sending, and the end.

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._send(self._outgoing.read())

    def _send(self, records: bytes) -> None:
        try:  # noqa: SIM105 - `suppress` costs as much as the call
            self._raw.write(records)
        except RuntimeError:
            pass  # the event loop has closed it, and is about to say so

    def _finish_sending(self) -> None:
        """End our side, and wait a while for the peer to end its own, reading what it sends."""
        if not self._raw.is_closing():
            try:
                self._raw.write_eof()
                self._raw.resume_reading()
                self._expire_after_lingering()
            except OSError:  # asyncio's own loop, where the peer has reset the connection
                self._raw.abort()

    def _expire_after_lingering(self) -> None:
        self.deadline = self.worker.clock() + self.worker.timeouts.linger
        self.worker.deadlines.watch(self)

    # What the sweep calls.

    def expire(self, now: float) -> None:
        """Give up a handshake, or a peer that does not end its side."""
        self.deadline = NEVER
        if self._state == HANDSHAKE:
            self._give_up(TimeoutError("the handshake did not finish in time"))
        elif self._failure is None and self._raw.get_write_buffer_size():
            # It reads slowly; the protocol knows how long it may.
            self.deadline = now + self.worker.timeouts.linger
        else:
            self._raw.abort()

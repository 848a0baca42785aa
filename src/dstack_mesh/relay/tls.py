"""TLS over a plain connection: records in and out of memory, on the transport of an event loop.

Event loops bring TLS of their own. This is here for what it does differently (ADR 6):

- the alert with which our side refuses a peer is really sent (RFC 8446 6.2);
- a read ends when there are no more bytes, not with an exception, and what comes in many records
  is handed over in one piece;
- a connection has no buffer but what OpenSSL keeps, and that stays small; a caller that has sent
  nothing has not even that;
- a handshake costs no task, future or timer: the worker's sweep sees to its time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, Final

from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.stream import StreamProtocol
from dstack_mesh.relay.worker import Worker

Wrap = Callable[[ssl.MemoryBIO, ssl.MemoryBIO], ssl.SSLObject]
"""Makes a TLS session between what comes in and what goes out."""

Settled = Callable[[Exception | None], None]
"""Called once: with None, or with what the handshake failed by; a server's when all is gone."""

_SLICE_BYTES: Final = 32 * 1024
"""What is put into OpenSSL's buffer of what comes in at a time: it grows, and never shrinks."""

_RECORD_BYTES: Final = 16 * 1024
"""The most that one record carries (RFC 8446 5.1), and what is put in at a time on the way out."""

_MAX_UNREAD_BYTES: Final = 1024 * 1024
"""What of TLS's own answers may wait to be sent; writers of data stop far below it."""

_HANDSHAKE: Final = 0
_OPEN: Final = 1
_CLOSING: Final = 2
_REFUSED: Final = 3
_GONE: Final = 4


class TlsTransport(StreamProtocol):
    """One end of a TLS connection: a protocol to the event loop, a transport to its `protocol`.

    The protocol hears of the connection when the handshake is done, and never of one that fails.
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
        self._state = _HANDSHAKE
        self._failure: Exception | None = None
        self._raw: Any = None
        self._sslobj: Any = None
        self._incoming: Any = None
        self._outgoing: Any = None

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake; a server waits for the client's first bytes."""
        self._raw = transport
        if self._state != _HANDSHAKE:  # given up before it began
            self._raw.abort()
            return
        if self.deadline is not NEVER:
            self.worker.deadlines.watch(self)
        if not self._server_side and self._begin():
            self._shake_hands()

    def data_received(self, data: bytes) -> None:
        """Decrypt what was read, or go on with the handshake."""
        if self._state == _OPEN:
            if len(data) <= _RECORD_BYTES:
                self._receive_little(data)
            else:
                self._receive_much(data)
        elif self._state == _HANDSHAKE and (self._sslobj is not None or self._begin()):
            self._incoming.write(data[:_SLICE_BYTES])
            self._shake_hands()
            if len(data) > _SLICE_BYTES:
                self.data_received(data[_SLICE_BYTES:])

    def eof_received(self) -> bool:
        """Let the connection end; what comes without a close-notify is no end in order."""
        if self._state == _OPEN:
            self._state = _CLOSING
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever still waits."""
        state, self._state = self._state, _GONE
        self.worker.deadlines.unwatch(self)
        failure = self._failure or exc
        # Settled before, unless the handshake failed, or `connection_made` did.
        self._settle(failure or ConnectionResetError("the peer ended it"))
        if state in (_OPEN, _CLOSING):
            self._protocol.connection_lost(failure)

    def pause_writing(self) -> None:
        """Pass on what the event loop wishes."""
        if self._state in (_OPEN, _CLOSING):
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass on what the event loop wishes."""
        if self._state in (_OPEN, _CLOSING):
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
        self._state = _REFUSED
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
        self._state = _OPEN
        self._protocol.connection_made(self)  # type: ignore[arg-type]  # a transport but for bases
        self._settle(None)
        if self._state == _OPEN and self._incoming.pending:
            self._receive_little(b"")

    def _refuse(self, error: Exception) -> None:
        """Send the alert that OpenSSL has made, and give the peer the time to see it.

        A TLS 1.3 client sends its request before it can know of the refusal. Closing with that
        unread makes the kernel reset the connection, and a reset discards the alert.
        """
        self._state = _REFUSED
        self._failure = error
        self._flush()
        self._finish_sending()
        if not self._server_side:  # a caller that stays costs what a handshake does, until it goes
            self._settle(error)

    def _settle(self, error: Exception | None) -> None:
        settled, self._settled = self._settled, None
        if settled is not None:
            settled(error)

    # Reading.

    def _receive_little(self, data: bytes) -> None:
        """Decrypt what can be no more than one full record's worth."""
        incoming = self._incoming
        incoming.write(data)
        found = b""
        failure: Exception | None = None
        ended = False
        try:
            while incoming.pending:
                piece = self._sslobj.read(_RECORD_BYTES)
                if not piece:
                    ended = True
                    break
                found = found + piece if found else piece
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            failure = self._failure = error
        if found:
            self._protocol.data_received(found)
        if ended or failure is not None or self._outgoing.pending:
            self._after_reading(ended, failure)

    def _receive_much(self, data: bytes) -> None:
        """Decrypt many records into the worker's buffer, and hand them over together."""
        buffer = self.worker.buffer
        view = memoryview(data)
        failure: Exception | None = None
        ended = False
        filled = 0
        try:
            for at in range(0, len(data), _SLICE_BYTES):
                self._incoming.write(view[at : at + _SLICE_BYTES])
                while self._incoming.pending:
                    try:
                        count = self._sslobj.read(_RECORD_BYTES, buffer[filled:])
                    except ssl.SSLWantReadError:
                        break
                    if not count:
                        ended = True
                        break
                    filled += count
                    if filled > len(buffer) - _RECORD_BYTES:
                        self._protocol.data_received(bytes(buffer[:filled]))
                        filled = 0
                        if self._state != _OPEN:
                            break
                if ended or self._state != _OPEN:
                    break
        except ssl.SSLError as error:
            failure = self._failure = error
        if filled:
            self._protocol.data_received(bytes(buffer[:filled]))
        if ended or failure is not None or self._outgoing.pending:
            self._after_reading(ended, failure)

    def _after_reading(self, ended: bool, failure: Exception | None) -> None:
        """Act on what is rare: the peer's end, a failure, an answer that TLS itself gives."""
        if self._state != _OPEN:
            return
        if failure is not None:
            self._fail(failure)
            return
        self._flush()
        # Each KeyUpdate may ask for one in return (RFC 8446 4.6.3), and in TLS 1.2 each attempt to
        # renegotiate gets an alert: a peer may have us answer without end, and read nothing.
        if self._raw.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._fail(ssl.SSLError("the peer does not read what TLS has to answer it"))
        elif ended:
            self._protocol.eof_received()
            if self._state == _OPEN:
                self._state = _CLOSING
                self._say_goodbye()
                self._raw.close()

    def _fail(self, failure: Exception) -> None:
        """End what cannot go on, once what was written and the alert are sent."""
        self._failure = self._failure or failure  # a session that has failed fails writers, too
        self._state = _CLOSING
        if self._outgoing.pending:
            self._flush()
            self._raw.close()
            self._expire_after_lingering()
        else:
            self._raw.abort()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._send(self._outgoing.read())

    def _send(self, records: bytes) -> None:
        try:  # noqa: SIM105 - `suppress` costs as much as the call
            self._raw.write(records)
        except RuntimeError:
            pass  # the event loop has closed it, and is about to say so

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # it wants to read the peer's
            self._sslobj.shutdown()
        self._flush()

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
        if self._state == _HANDSHAKE:
            self._give_up(TimeoutError("the handshake did not finish in time"))
        elif self._failure is None and self._raw.get_write_buffer_size():
            # It reads slowly; the protocol knows how long it may.
            self.deadline = now + self.worker.timeouts.linger
        else:
            self._raw.abort()

    # What the protocol calls: see `asyncio.Transport`.

    def write(self, data: bytes) -> None:
        """Encrypt and send."""
        if self._state != _OPEN:
            return
        try:
            if len(data) <= _RECORD_BYTES:
                self._sslobj.write(data)
                self._send(self._outgoing.read())
                return
            view = memoryview(data)
            pieces: list[bytes] = []
            for at in range(0, len(data), _RECORD_BYTES):
                self._sslobj.write(view[at : at + _RECORD_BYTES])
                pieces.append(self._outgoing.read())
            self._send(b"".join(pieces))
        except ssl.SSLError as error:
            self._fail(error)

    def close(self) -> None:
        """End the connection in order, once what was written is sent."""
        if self._state == _HANDSHAKE:
            self.abort()
        elif self._state == _OPEN:
            self._state = _CLOSING
            self._say_goodbye()
            self._finish_sending()

    def abort(self) -> None:
        """End the connection at once; a handshake in progress has failed then."""
        if self._state == _HANDSHAKE:
            self._state = _REFUSED
            self._failure = ConnectionAbortedError("the handshake was given up")
        elif self._state == _OPEN:
            self._state = _CLOSING
        if self._raw is not None and self._state != _GONE:
            self._raw.abort()

    def is_closing(self) -> bool:
        """Tell whether the connection is on its way out."""
        return self._state != _OPEN

    def pause_reading(self) -> None:
        """Stop reading."""
        if self._state == _OPEN:
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self._state == _OPEN:
            self._raw.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set when the protocol is told to pause: by encrypted bytes."""
        self._raw.set_write_buffer_limits(high=high, low=low)

    def get_write_buffer_size(self) -> int:
        """Give how many bytes wait to be sent, encrypted."""
        return int(self._raw.get_write_buffer_size())

    def can_write_eof(self) -> bool:
        """Tell that TLS has no half-close here."""
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Give `ssl_object`, or what the plain transport knows."""
        if name == "ssl_object":
            return self.ssl_object
        return self._raw.get_extra_info(name, default)

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

import contextlib
import ssl
from typing import Any, Final

from dstack_mesh.relay.stream import StreamProtocol
from dstack_mesh.relay.tls_handshake import CLOSING, GONE, HANDSHAKE, OPEN, REFUSED, TlsHandshake

_SLICE_BYTES: Final = 32 * 1024
"""What is put into OpenSSL's buffer of what comes in at a time: it grows, and never shrinks."""

_RECORD_BYTES: Final = 16 * 1024
"""The most that one record carries (RFC 8446 5.1), and what is put in at a time on the way out."""

_MAX_UNREAD_BYTES: Final = 1024 * 1024
"""What of TLS's own answers may wait to be sent; writers of data stop far below it."""


class TlsTransport(TlsHandshake):
    """One end of a TLS connection: a protocol to the event loop, a transport to its `protocol`."""

    __slots__ = ()

    # What the event loop calls.

    def data_received(self, data: bytes) -> None:
        """Decrypt what was read, or go on with the handshake."""
        if self._state == OPEN:
            if len(data) <= _RECORD_BYTES:
                self._receive_little(data)
            else:
                self._receive_much(data)
        elif self._state == HANDSHAKE and (self._sslobj is not None or self._begin()):
            self._incoming.write(data[:_SLICE_BYTES])
            self._shake_hands()
            if len(data) > _SLICE_BYTES:
                self.data_received(data[_SLICE_BYTES:])

    def eof_received(self) -> bool:
        """Let the connection end; what comes without a close-notify is no end in order."""
        if self._state == OPEN:
            self._state = CLOSING
        return False

    def handshake_done(self) -> None:
        """See `TlsHandshake`."""
        self._protocol.connection_made(self)  # type: ignore[arg-type]  # a transport but for bases
        self._settle(None)
        if self._state == OPEN and self._incoming.pending:
            self._receive_little(b"")

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
                        if self._state != OPEN:
                            break
                if ended or self._state != OPEN:
                    break
        except ssl.SSLError as error:
            failure = self._failure = error
        if filled:
            self._protocol.data_received(bytes(buffer[:filled]))
        if ended or failure is not None or self._outgoing.pending:
            self._after_reading(ended, failure)

    def _after_reading(self, ended: bool, failure: Exception | None) -> None:
        """Act on what is rare: the peer's end, a failure, an answer that TLS itself gives."""
        if self._state != OPEN:
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
            if self._state == OPEN:
                self._state = CLOSING
                self._say_goodbye()
                self._raw.close()

    def _fail(self, failure: Exception) -> None:
        """End what cannot go on, once what was written and the alert are sent."""
        self._failure = self._failure or failure  # a session that has failed fails writers, too
        self._state = CLOSING
        if self._outgoing.pending:
            self._flush()
            self._raw.close()
            self._expire_after_lingering()
        else:
            self._raw.abort()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # it wants to read the peer's
            self._sslobj.shutdown()
        self._flush()

    # What the protocol calls: see `asyncio.Transport`.

    def write(self, data: bytes) -> None:
        """Encrypt and send."""
        if self._state != OPEN:
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
            self._raw.writelines(pieces)  # one call of the system, and nothing copied together
        except ssl.SSLError as error:
            self._fail(error)
        except RuntimeError:
            pass  # as in `_send`

    def close(self) -> None:
        """End the connection in order, once what was written is sent."""
        if self._state == HANDSHAKE:
            self.abort()
        elif self._state == OPEN:
            self._state = CLOSING
            self._say_goodbye()
            self._finish_sending()

    def abort(self) -> None:
        """End the connection at once; a handshake in progress has failed then."""
        if self._state == HANDSHAKE:
            self._state = REFUSED
            self._failure = ConnectionAbortedError("the handshake was given up")
        elif self._state == OPEN:
            self._state = CLOSING
        if self._raw is not None and self._state != GONE:
            self._raw.abort()

    def is_closing(self) -> bool:
        """Tell whether the connection is on its way out."""
        return self._state != OPEN

    def pause_reading(self) -> None:
        """Stop reading."""
        if self._state == OPEN:
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self._state == OPEN:
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

    def set_protocol(self, protocol: object) -> None:
        """Let go of the protocol, which holds this transport: see `memory.let_go`."""
        self._protocol = StreamProtocol()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Give `ssl_object`, or what the plain transport knows."""
        if name == "ssl_object":
            return self.ssl_object
        return self._raw.get_extra_info(name, default)

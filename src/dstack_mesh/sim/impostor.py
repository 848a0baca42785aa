"""A TLS server that completes real handshakes with a given chain and counts what reaches it.

It runs in threads of its own, apart from the event loop of whoever is under test, and uses
OpenSSL's own handshake: what it counts as application bytes is what OpenSSL decrypted.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Self

from dstack_mesh.model import TcpAddress

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from dstack_mesh.sim.certificates import Issued

_HANDSHAKE_SECONDS = 10.0
_KEPT = 64 * 1024


def ok_answer(received: bytes) -> bytes | None:
    """Answer `200` with a body of `ok` to each request, going by heads alone (no body is read).

    For targets that are good at first, so that a client pools a connection or keeps a session.
    """
    if not received.endswith(b"\r\n\r\n"):
        return None
    return b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Impostor:
    """Listens at once when made; `close` (or leaving the `with` block) ends it.

    Parameters:
        issued: the chain to show. `show` changes it for the connections that come after.
        client_ca_pem: a root; a client certificate is asked for and has to verify under it, as
            OpenSSL has no way to take just any. Without it none is asked for.
        answer: gets what came since the last answer, and returns bytes to send or None.
        tickets: whether sessions may be resumed, also after `show` changed the chain.

    """

    def __init__(
        self,
        issued: Issued,
        *,
        client_ca_pem: bytes | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        min_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
        max_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        tickets: bool = True,
        answer: Callable[[bytes], bytes | None] | None = None,
    ) -> None:
        self._context = _context(client_ca_pem, min_version, max_version, tickets=tickets)
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._answer = answer
        self.connections = 0
        """TCP connections accepted."""
        self.handshakes = 0
        """Handshakes that came to their end, resumed ones included."""
        self.resumed = 0
        """Handshakes that resumed a session."""
        self.failures: list[str] = []
        """What ended each handshake that failed, in OpenSSL's words."""
        self.application_bytes = 0
        """Bytes of application data that arrived, in all connections together."""
        self.received = b""
        """The first 64 KiB of them."""
        self.closed = 0
        """Connections that had a handshake and are over."""

        self.show(issued)
        self._listener = socket.create_server((host, port), backlog=128)
        self.address = TcpAddress(*self._listener.getsockname()[:2])
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, issued: Issued) -> None:
        """Show this chain from the next connection on; sessions made before may be resumed.

        Its key has to be of the type of the one before: OpenSSL keeps a certificate for each type
        of key, and goes on showing the older one where both types will do.
        """
        issued.load_into(self._context)

    def drop_connections(self) -> None:
        """Cut every open connection."""
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, cut what is open, and wait for the threads."""
        self._closing = True
        with contextlib.suppress(OSError):
            # Wakes up the accepting thread, which a mere close does not.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(_HANDSHAKE_SECONDS + 5)

    def wait(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Wait until `condition()` (of the counters) holds. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                raise TimeoutError(
                    f"after {timeout} s: {self.connections} connections, {self.handshakes} "
                    f"handshakes, {self.closed} closed, {self.application_bytes} bytes"
                )

    def wait_for_handshakes(self, count: int, timeout: float = 10.0) -> None:
        """Wait until this many handshakes have ended well. Raises `TimeoutError`."""
        self.wait(lambda: self.handshakes >= count, timeout)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="impostor", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                self.connections += 1
                self._changed.notify_all()
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(_HANDSHAKE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            tls = self._context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        except OSError:
            connection.close()
            return
        with self._changed:
            self._open.add(tls)
        done = False
        try:
            if self._closing:
                return
            tls.do_handshake()
            done = True
            self._count_handshake(resumed=bool(tls.session_reused))
            tls.settimeout(None)
            self._receive(tls)
        except OSError as error:
            if not done:
                with self._changed:
                    self.failures.append(str(error))
                _linger(tls)
        finally:
            with self._changed:
                self._open.discard(tls)
                self.closed += done
                self._changed.notify_all()
            tls.close()

    def _count_handshake(self, *, resumed: bool) -> None:
        with self._changed:
            self.handshakes += 1
            self.resumed += resumed
            self._changed.notify_all()

    def _receive(self, tls: ssl.SSLSocket) -> None:
        pending = b""
        while data := tls.recv(64 * 1024):
            with self._changed:
                self.application_bytes += len(data)
                self.received += data[: _KEPT - len(self.received)]
                self._changed.notify_all()
            if self._answer is None:
                continue
            pending += data
            if (answer := self._answer(pending)) is not None:
                pending = b""
                tls.sendall(answer)


def _linger(tls: ssl.SSLSocket) -> None:
    """Read on until the client has ended its side, or the alert may not reach it.

    Closing with something unread resets the connection, and whoever relays it then may drop what
    it has not passed on yet.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(tls, socket.SHUT_WR)  # TLS's own forgets the session
        while socket.socket.recv(tls, _KEPT):
            pass


def _context(
    client_ca_pem: bytes | None,
    min_version: ssl.TLSVersion,
    max_version: ssl.TLSVersion,
    *,
    tickets: bool,
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # An impostor shows whatever it has, weak keys too; it is the client that has to mind.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = min_version, max_version
    if not tickets:
        # The option alone makes TLS 1.3 tickets stateful, not absent (SSL_CTX_set_num_tickets(3)).
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
    if client_ca_pem is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=client_ca_pem.decode())
    return context

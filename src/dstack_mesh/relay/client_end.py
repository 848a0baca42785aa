"""What a client's connection is to asyncio, to its exchange and to its listener."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from typing import Any, Final

from dstack_mesh.errors import MeshError, Overloaded
from dstack_mesh.memory import let_go
from dstack_mesh.relay.answers import problem
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.interfaces import Client, Listener

_WRITE_HIGH_WATER: Final = 128 * 1024
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class ClientEnd(Client):
    """The server's end of a connection, but for the heads on it: see `relay.downstream`."""

    __slots__ = (
        "_exchange",
        "_head_started",
        "_lingering",
        "_listener",
        "_paused",
        "_pending",
        "_saw_eof",
        "_tunnel",
        "transport",
    )

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener.worker)
        self.transport: Any = None
        self._listener = listener
        self._exchange: Exchange | None = None
        self._pending = b""
        """What was read, and is no exchange's yet."""
        self._head_started = False
        self._paused = False
        self._lingering = False
        self._tunnel = False
        self._saw_eof = False

    def _welcome(self) -> None:
        """Learn that the connection is one of the listener's."""
        raise NotImplementedError

    def _next(self) -> None:
        """Look for a request in what was kept."""
        raise NotImplementedError

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self.transport = transport
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER)
        self.worker.deadlines.watch(self)
        if not self._listener.opened(self):
            self._refuse(Overloaded("the limit on connections is reached (MESH_MAX_CONNECTIONS)"))
            return
        self._welcome()
        # A handshake may end after draining has begun; its request is then awaited, but not long.
        timeouts = self.worker.timeouts
        patience = timeouts.head if self._listener.draining else timeouts.idle
        self.deadline = self.worker.clock() + patience

    def eof_received(self) -> bool:
        """Let a client that has only finished sending get its answer (plain TCP)."""
        self._saw_eof = True
        exchange = self._exchange
        if exchange is None or self._tunnel:
            return False
        if exchange.request_done and self.transport.can_write_eof():  # TLS has no half-close here
            return True
        if exchange.status:
            self.cut()  # a response that has begun ends here, and must not look whole
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the exchange."""
        self.worker.deadlines.unwatch(self)
        self._listener.closed(self)
        if self._exchange is not None:
            self._exchange.client_lost()
        let_go(self.transport)

    def pause_writing(self) -> None:
        """Pause the response's source."""
        self.writable = False
        if self._exchange is not None:
            self._exchange.client_writable(False)

    def resume_writing(self) -> None:
        """Let the response's source, or the next request, go on."""
        self.writable = True
        if self._exchange is not None:
            self._exchange.client_writable(True)
        elif self._pending:
            self.worker.loop.call_soon(self._next)
        else:
            self.resume_reading()

    # What the sweep and the listener call.

    def expire(self, now: float) -> None:
        """Act on the deadline of whatever is being waited for."""
        self.deadline = NEVER
        if self._exchange is not None:
            self._exchange.timed_out()
        else:
            self.transport.abort()

    def waiting_since(self) -> float:
        """See `Client`."""
        if (
            self._exchange is not None
            or self._head_started
            or self._lingering
            or self._pending
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size()
        ):
            return NEVER
        return self.deadline - self.worker.timeouts.idle

    def drain(self) -> None:
        """See `Client`."""
        if self._exchange is None and not self._head_started and not self._lingering:
            if self.writable:
                # TLS waits for the client's close_notify, and a frozen client never sends it.
                self.deadline = self.worker.clock() + self.worker.timeouts.linger
            self.transport.close()

    # What the exchange calls: see `Client`.

    def write(self, data: bytes) -> None:
        """Send to the client."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def pause_reading(self) -> None:
        """Stop reading."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, unless bytes for the next exchange are held already."""
        held = self._pending and self._exchange is not None
        if self._paused and not held and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def keep_for_later(self, data: bytes) -> None:
        """Hold bytes behind the request's end, and no more than one read's worth of them."""
        self._pending += data
        self.pause_reading()

    def begin_tunnel(self) -> bytes:
        """Hand over what was held."""
        self._tunnel = True
        kept, self._pending = self._pending, b""
        if self._saw_eof:  # there is no half of a tunnel
            self.worker.loop.call_soon(self.transport.close)
        self.resume_reading()
        return kept

    def may_persist(self) -> bool:
        """Tell whether another request is welcome."""
        return not (self._listener.draining or self._saw_eof)

    def exchange_ended(self, exchange: Exchange, keep: bool) -> None:
        """Record the exchange; go on with the next request, or close."""
        self._exchange = None
        self._listener.record(exchange)
        if self.transport.is_closing():
            return
        # Also on the way out: a client may never take the last of its answer.
        self.deadline = exchange.finished + self.worker.timeouts.idle
        if keep and not (self._listener.draining or self._saw_eof):
            if self.writable:
                if self._pending:
                    # Not from here: a client that pipelines would make this call itself.
                    self.worker.loop.call_soon(self._next)
                elif self._paused:
                    self.resume_reading()
            else:
                self.pause_reading()
        elif exchange.request_done or self._saw_eof:
            self.transport.close()
        else:
            self._linger()

    def cut(self) -> None:
        """End the connection with a reset: a FIN could pass for a response's end."""
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.transport.abort()

    # Refusing.

    def _refuse(self, error: MeshError, request_id: bytes = b"") -> None:
        """Answer what could not be understood as a request, and close."""
        named = request_id.decode("latin-1") or secrets.token_hex(16)
        self._listener.refused(error, named)
        answer = problem(error, named)
        self.write(answer.render(b"", b"Connection: close\r\n"))
        self._linger()

    def _linger(self) -> None:
        """Close once the client has had the time to read its answer.

        A socket closed with bytes unread sends a reset, which can destroy an answer under way
        (RFC 9112 9.6).
        """
        self._lingering = True
        self._pending = b""
        self.deadline = self.worker.clock() + self.worker.timeouts.linger
        self.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

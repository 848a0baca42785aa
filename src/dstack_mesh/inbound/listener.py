"""Accepting TLS connections: limits before the handshake, and a time limit on it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from errno import EMFILE

from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.identity.tls import describe_tls_failure
from dstack_mesh.inbound.terminator import Terminator
from dstack_mesh.log import event
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.tls import TlsTransport

log = logging.getLogger(__name__)

_ACCEPT_PAUSE = 0.2
"""Seconds without accepting after the system had no descriptor left for another connection."""


MAX_HANDSHAKES = 512
"""Handshakes in progress. An honest one takes milliseconds, a silent one the whole time limit."""


class TlsListener:
    """Accepts on one socket, and keeps count of the handshakes in progress.

    Where there is no room for another handshake, the oldest in progress gives way (ADR 5): callers
    that never finish theirs cannot keep others out, and cost a bounded amount of memory.
    """

    def __init__(
        self,
        service: Service,
        terminator: Terminator,
        identity: IdentityStore,
        max_connections: int,
        count_handshake: Callable[[str], None] = lambda result: None,
    ) -> None:
        """`count_handshake` is called with `ok` or `failed` for each TLS handshake."""
        self._count_handshake = count_handshake
        self._service = service
        self._terminator = terminator
        self._identity = identity
        self._max_connections = max_connections
        self._max_handshakes = min(MAX_HANDSHAKES, max_connections)
        # In their order of age.
        self._handshakes: dict[TlsTransport, None] = {}
        self._failures = 0
        self._accepting: asyncio.Task[None] | None = None

    def start(self, sock: socket.socket) -> None:
        """Begin to accept on a listening, non-blocking socket."""
        loop = self._service.worker.loop
        self._accepting = loop.create_task(self._accept(sock))

    async def stop(self) -> None:
        """Stop accepting; handshakes in progress go on. The socket stays the caller's."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)

    def abort(self) -> None:
        """Give up the handshakes in progress."""
        for handshake in list(self._handshakes):
            handshake.abort()

    async def _accept(self, sock: socket.socket) -> None:
        loop = self._service.worker.loop
        while True:
            try:
                accepted, _ = await loop.sock_accept(sock)
            except OSError as error:
                self._accept_failed(error)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if self._failures:
                event(log, logging.INFO, "accepting_again", failures=self._failures)
                self._failures = 0
            snapshot = self._identity.current
            if snapshot is None or not self._has_room():
                accepted.close()
                continue
            await self._begin(accepted, snapshot)
            # A full backlog would otherwise be taken in one go, while everybody else waits.
            await asyncio.sleep(0)

    def _accept_failed(self, error: OSError) -> None:
        """Say so once, not five times a second for as long as it lasts."""
        self._failures += 1
        if self._failures == 1:
            hint = "; raise the limit on open files (ulimit -n)" if error.errno == EMFILE else ""
            event(log, logging.WARNING, "accept_failed", error=f"{error}{hint}")

    def _has_room(self) -> bool:
        """Tell whether one more may be let in; the oldest handshake may have to give way."""
        connections, handshakes = len(self._service.connections), len(self._handshakes)
        if connections >= self._max_connections:
            return False
        most = min(self._max_handshakes, self._max_connections - connections)
        if handshakes >= most:
            oldest = next(iter(self._handshakes))
            oldest.abort()
            self._settled(oldest, ConnectionAbortedError("it gave way to a newer one"))
        return True

    async def _begin(self, accepted: socket.socket, snapshot: Snapshot) -> None:
        """Hand the connection to TLS; from here on nobody waits for it."""
        worker = self._service.worker
        protocol = self._service.protocol(self._terminator.handler(snapshot))
        transport = TlsTransport(
            worker,
            protocol,
            lambda incoming, outgoing: snapshot.server_context.wrap_bio(incoming, outgoing, True),
            lambda error: self._settled(transport, error),
            server_side=True,
            deadline=worker.clock() + worker.timeouts.head,
        )
        self._handshakes[transport] = None
        try:
            await worker.loop.connect_accepted_socket(transport.as_protocol, accepted)
        except BaseException as error:
            transport.abort()
            accepted.close()
            self._settled(transport, error)
            if not isinstance(error, OSError):
                raise

    def _settled(self, transport: TlsTransport, error: BaseException | None) -> None:
        if transport not in self._handshakes:
            return  # given up before the event loop had it
        del self._handshakes[transport]
        self._count_handshake("ok" if error is None else "failed")
        if error is not None:
            event(
                log, logging.DEBUG, "inbound_handshake_failed", reason=describe_tls_failure(error)
            )

"""TLS on accepted connections: limits before the handshake, and a time limit on it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.identity.tls import describe_tls_failure
from dstack_mesh.inbound.terminator import Terminator
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.tls import TlsTransport

log = logging.getLogger(__name__)

MAX_HANDSHAKES = 512
"""Handshakes in progress. An honest one takes milliseconds, a silent one the whole time limit."""


class TlsListener:
    """Takes accepted sockets, and keeps count of the handshakes in progress.

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
        handshake_failed: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`count_handshake` is called with `ok` or `failed` for each TLS handshake.

        `handshake_failed` is told why one failed.
        """
        self._handshake_failed = handshake_failed
        self._count_handshake = count_handshake
        self._service = service
        self.terminator = terminator
        self._identity = identity
        self._max_connections = max_connections
        self._max_handshakes = min(MAX_HANDSHAKES, max_connections)
        # In their order of age.
        self._handshakes: dict[TlsTransport, None] = {}
        self._opening: dict[asyncio.Task[None], tuple[TlsTransport, socket.socket]] = {}

    def take(self, accepted: socket.socket) -> None:
        """See `Take`: begin a handshake, or close."""
        snapshot = self._identity.current
        if snapshot is None or not self._has_room():
            accepted.close()
            return
        transport = self._handshake(snapshot)
        self._handshakes[transport] = None
        task = self._service.worker.loop.create_task(self._open(transport, accepted))
        self._opening[task] = transport, accepted
        task.add_done_callback(self._opened)

    def handshakes(self) -> int:
        """Count the handshakes in progress."""
        return len(self._handshakes)

    def abort(self) -> None:
        """Give up the handshakes in progress."""
        for handshake in list(self._handshakes):
            handshake.abort()
        for task, (transport, accepted) in list(self._opening.items()):
            task.cancel()
            accepted.close()  # a task that has not begun closes nothing
            self._settled(transport, ConnectionAbortedError("the listener has ended"))

    def _has_room(self) -> bool:
        """Tell whether one more may be let in; the oldest handshake may have to give way."""
        connections, handshakes = len(self._service.connections), len(self._handshakes)
        if connections + handshakes >= self._max_connections and self._service.give_way():
            connections -= 1
        if connections >= self._max_connections:
            self._service.turned_away()
            return False
        most = min(self._max_handshakes, self._max_connections - connections)
        if handshakes >= most:
            oldest = next(iter(self._handshakes))
            oldest.abort()
            self._settled(oldest, ConnectionAbortedError("it gave way to a newer one"))
        return True

    def _handshake(self, snapshot: Snapshot) -> TlsTransport:
        worker = self._service.worker
        transport = TlsTransport(
            worker,
            self._service.protocol(self.terminator.handler(snapshot)),
            lambda incoming, outgoing: snapshot.server_context.wrap_bio(incoming, outgoing, True),
            lambda error: self._settled(transport, error),
            server_side=True,
            deadline=worker.clock() + worker.timeouts.head,
        )
        return transport

    async def _open(self, transport: TlsTransport, accepted: socket.socket) -> None:
        """Hand the connection to TLS; from here on nobody waits for it."""
        loop = self._service.worker.loop
        try:
            await loop.connect_accepted_socket(transport.as_protocol, accepted)
        except BaseException as error:
            transport.abort()
            accepted.close()
            self._settled(transport, error)
            if not isinstance(error, OSError):
                raise

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.pop(task, None)

    def _settled(self, transport: TlsTransport, error: BaseException | None) -> None:
        if transport not in self._handshakes:
            return  # given up before the event loop had it
        del self._handshakes[transport]
        self._count_handshake("ok" if error is None else "failed")
        if error is not None:
            self._handshake_failed(describe_tls_failure(error))

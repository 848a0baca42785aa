"""TLS on accepted connections: limits before the handshake, and a time limit on it."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.identity.tls import accept_tls, describe_tls_failure
from dstack_mesh.inbound.terminator import Terminator
from dstack_mesh.log import event
from dstack_mesh.relay.service import Service

log = logging.getLogger(__name__)

MAX_HANDSHAKES = 512
"""Handshakes in progress. An honest one takes milliseconds, a silent one the whole time limit."""


class TlsListener:
    """Takes accepted sockets, each handshake in a task of its own until it is done.

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
        self._handshakes: dict[asyncio.Task[None], socket.socket] = {}

    def take(self, accepted: socket.socket) -> None:
        """See `Take`: begin a handshake, or close."""
        snapshot = self._identity.current
        if snapshot is None or not self._has_room():
            accepted.close()
            return
        task = self._service.worker.loop.create_task(self._serve(accepted, snapshot))
        self._handshakes[task] = accepted
        task.add_done_callback(lambda done: self._handshakes.pop(done, None))

    def abort(self) -> None:
        """Give up the handshakes in progress."""
        for task, accepted in list(self._handshakes.items()):
            task.cancel()
            accepted.close()  # a task that has not begun closes nothing; TLS's transport keeps it

    def _has_room(self) -> bool:
        """Tell whether one more may be let in; the oldest handshake may have to give way."""
        connections, handshakes = len(self._service.connections), len(self._handshakes)
        if connections + handshakes >= self._max_connections and self._service.give_way():
            connections -= 1
        if connections >= self._max_connections:
            self._service.refused()
            return False
        most = min(self._max_handshakes, self._max_connections - connections)
        if handshakes >= most:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        return True

    async def _serve(self, accepted: socket.socket, snapshot: Snapshot) -> None:
        worker = self._service.worker
        handler = self._terminator.handler(snapshot)
        try:
            await accept_tls(
                worker.loop,
                accepted,
                lambda: self._service.protocol(handler),
                snapshot.server_context,
                worker.timeouts.head,
            )
        except asyncio.CancelledError:
            self._count_handshake("failed")
            raise
        except (OSError, ssl.SSLError, TimeoutError) as error:
            self._count_handshake("failed")
            event(
                log, logging.DEBUG, "inbound_handshake_failed", reason=describe_tls_failure(error)
            )
        else:
            self._count_handshake("ok")

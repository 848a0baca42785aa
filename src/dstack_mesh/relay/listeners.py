"""All listeners of a process: what each does with the connections that it accepts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from dstack_mesh.relay.accept import PER_TURN, Acceptor, Share, Take, spare_descriptors
from dstack_mesh.relay.interfaces import Handler, P
from dstack_mesh.relay.service import Service

_SHARES = {"inbound": 2, "auth": 2, "outbound": 1, "admin": 0}
"""Of the reserve of descriptors, what each leaves to others: strangers reach inbound."""

_HANDSHAKES_PER_TURN = 1
"""A handshake takes its time, and whoever is being served waits for it."""


ShareOf = Callable[[str, Callable[[], int]], Share | None]
"""Gives our share of a listener, by its name and what counts our connections there."""


class Listeners:
    """Accepts on them, by name. The sockets are the caller's."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, share_of: ShareOf = lambda name, count: None
    ) -> None:
        """`share_of` is for sockets on which other processes accept too."""
        self._loop = loop
        self._share_of = share_of
        self._acceptors: dict[str, Acceptor] = {}
        self._intakes: dict[str, PlainIntake] = {}

    def serve(self, name: str, sock: socket.socket, service: Service, handler: Handler[P]) -> None:
        """Serve plain HTTP."""
        intake = PlainIntake(self._loop, lambda: service.protocol(handler).as_protocol())
        self._intakes[name] = intake
        share = self._share_of(name, lambda: len(service.connections) + len(intake))
        self._accept(name, sock, service, intake.take, PER_TURN, share)

    def serve_tls(
        self,
        name: str,
        sock: socket.socket,
        service: Service,
        take: Take,
        handshakes: Callable[[], int],
    ) -> None:
        """Hand what is accepted to `take`, which begins a handshake; `handshakes` counts these."""
        share = self._share_of(name, lambda: len(service.connections) + handshakes())
        self._accept(name, sock, service, take, _HANDSHAKES_PER_TURN, share)

    def stop(self, name: str) -> None:
        """Stop accepting there, where that has begun."""
        acceptor = self._acceptors.pop(name, None)
        if acceptor is not None:
            acceptor.stop()

    def abort(self) -> None:
        """Stop everywhere, and give up what has been accepted and has no protocol yet."""
        for name in list(self._acceptors):
            self.stop(name)
        for intake in self._intakes.values():
            intake.abort()

    def _accept(
        self,
        name: str,
        sock: socket.socket,
        service: Service,
        take: Take,
        per_turn: int,
        share: Share | None,
    ) -> None:
        acceptor = self._acceptors[name] = Acceptor(
            self._loop,
            sock,
            name,
            take,
            per_turn=per_turn,
            spare=spare_descriptors(_SHARES[name]),
            yielding=service,
            share=share,
        )
        acceptor.start()


class PlainIntake:
    """Takes accepted sockets for plain HTTP: each gets a protocol of its own."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, protocol: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self._loop = loop
        self._protocol = protocol
        self._opening: dict[asyncio.Task[None], socket.socket] = {}

    def __len__(self) -> int:
        """Count those that have no protocol yet."""
        return len(self._opening)

    def take(self, accepted: socket.socket) -> None:
        """See `Take`."""
        task = self._loop.create_task(self._open(accepted))
        self._opening[task] = accepted
        task.add_done_callback(self._opened)

    def abort(self) -> None:
        """Give up what has no protocol yet."""
        for task in list(self._opening):
            task.cancel()

    async def _open(self, accepted: socket.socket) -> None:
        await self._loop.connect_accepted_socket(self._protocol, accepted)

    def _opened(self, task: asyncio.Task[None]) -> None:
        accepted = self._opening.pop(task)
        if task.cancelled() or task.exception() is not None:
            # One that has not begun closes nothing by itself.
            accepted.close()

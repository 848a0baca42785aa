"""What the relay's parts ask of each other: the seams at which tests put their fakes.

They are base classes, not `typing.Protocol`s: where the relay is compiled, a call of a base class's
method is a jump, and a protocol's is a search by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Generic, TypeVar

from dstack_mesh.errors import MeshError
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.stream import StreamProtocol
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.request import RequestFields
from dstack_mesh.wire.request_line import RequestLine

if TYPE_CHECKING:
    from dstack_mesh.relay.exchange import Exchange


class Plan:
    """What a handler made of a request's field lines."""

    __slots__ = ("fields",)

    def __init__(self, fields: RequestFields) -> None:
        self.fields = fields
        """The fields as parsed."""


P = TypeVar("P", bound=Plan)


Decision = Route | Answer | Coroutine[None, None, Answer]
"""Where a request goes, or what it is answered with, now or later."""


class Handler(Generic[P]):
    """Decides what becomes of the requests of one connection."""

    __slots__ = ()

    def connected(self, transport: asyncio.Transport) -> None:
        """Learn of the connection, once its TLS handshake is done where it has one."""

    def plan(self, line: RequestLine, block: bytes) -> P:
        """Understand a head. Raises `BadRequest` or `HeaderTooLarge`, which ends the connection."""
        raise NotImplementedError

    def route(self, line: RequestLine, plan: P, last: Route | None = None) -> Decision:
        """Decide where the request goes, or answer it, now or later. Raises a `MeshError`.

        `last` is what was decided before on this connection for the very same head, if anything:
        it may be given again where it is still right.
        """
        raise NotImplementedError

    def may_persist(self) -> bool:
        """Tell whether the connection may carry another request after this one."""
        return True


class Client(StreamProtocol):
    """The client's connection, as its exchange and its listener see it."""

    __slots__ = ("deadline", "worker", "writable")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.deadline = NEVER
        self.writable = True

    def handler(self) -> object:
        """Give what decides over the connection's requests."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Send to the client."""
        raise NotImplementedError

    def pause_reading(self) -> None:
        """Stop reading, so that what the client sends waits in its socket."""
        raise NotImplementedError

    def resume_reading(self) -> None:
        """Read on."""
        raise NotImplementedError

    def keep_for_later(self, data: bytes) -> None:
        """Take bytes behind the request's end."""
        raise NotImplementedError

    def begin_tunnel(self) -> bytes:
        """Give the bytes kept for later: they belong to the new protocol."""
        raise NotImplementedError

    def may_persist(self) -> bool:
        """Tell whether the listener wants another request on this connection."""
        raise NotImplementedError

    def exchange_ended(self, exchange: Exchange, keep: bool) -> None:
        """Go on with the next request, or close."""
        raise NotImplementedError

    def drain(self) -> None:
        """Close now if idle, else after the exchange in progress."""
        raise NotImplementedError

    def cut(self) -> None:
        """End the connection so that the client sees its response as incomplete."""
        raise NotImplementedError

    def expire(self, now: float) -> None:
        """Act on the deadline's having passed: end the connection where it waits for a request."""
        raise NotImplementedError

    def waiting_since(self) -> float:
        """Tell since when it has waited for a request; `NEVER` where it is not waiting for one."""
        raise NotImplementedError


class Listener:
    """The listener that accepted a connection."""

    __slots__ = ("draining", "worker")

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.draining = False

    def opened(self, connection: Client) -> bool:
        """Enter a connection in the books; `False` when there is no room for it."""
        raise NotImplementedError

    def closed(self, connection: Client) -> None:
        """Take a connection off the books."""
        raise NotImplementedError

    def record(self, exchange: Exchange) -> None:
        """Record an exchange that has ended."""
        raise NotImplementedError

    def refused(self, error: MeshError, request_id: str) -> None:
        """Record a head that was answered with `error` before it became an exchange."""
        raise NotImplementedError

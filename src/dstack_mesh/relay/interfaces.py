"""What the relay's parts ask of each other: the seams at which tests put their fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Protocol, TypeVar

from dstack_mesh.errors import MeshError
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.upstream import Route
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.body import Bytes
from dstack_mesh.wire.request import RequestFields, RequestLine

if TYPE_CHECKING:
    from dstack_mesh.relay.exchange import Exchange


class Plan(Protocol):
    """What a handler made of a request's field lines."""

    @property
    def fields(self) -> RequestFields:
        """The fields as parsed."""
        ...


P = TypeVar("P", bound=Plan)


class Handler(Protocol[P]):
    """Decides what becomes of the requests of one connection."""

    def connected(self, transport: asyncio.Transport) -> None:
        """Learn of the connection, once its TLS handshake is done where it has one."""
        ...

    def plan(self, line: RequestLine, block: bytes) -> P:
        """Understand a head. Raises `BadRequest` or `HeaderTooLarge`, which ends the connection."""
        ...

    def route(self, line: RequestLine, plan: P) -> Route | Answer | Coroutine[None, None, Answer]:
        """Decide where the request goes, or answer it, now or later. Raises a `MeshError`."""
        ...

    def may_persist(self) -> bool:
        """Tell whether the connection may carry another request after this one."""
        ...


class Listener(Protocol):
    """The listener that accepted a connection."""

    worker: Worker
    draining: bool

    def opened(self, connection: Connection) -> bool:
        """Enter a connection in the books; `False` when there is no room for it."""
        ...

    def closed(self, connection: Connection) -> None:
        """Take a connection off the books."""
        ...

    def record(self, exchange: Exchange) -> None:
        """Record an exchange that has ended."""
        ...

    def refused(self, error: MeshError, request_id: str) -> None:
        """Record a head that was answered with `error` before it became an exchange."""
        ...


class Connection(Protocol):
    """What a listener needs of its connections."""

    @property
    def handler(self) -> object:
        """What decides over its requests."""
        ...

    def drain(self) -> None:
        """Close now if idle, else after the exchange in progress."""
        ...

    def cut(self) -> None:
        """End the connection at once."""
        ...


class Client(Protocol):
    """The client's connection, as its exchange sees it."""

    worker: Worker
    deadline: float
    writable: bool

    @property
    def handler(self) -> object:
        """What decides over the connection's requests."""
        ...

    def write(self, data: bytes) -> None:
        """Send to the client."""

    def pause_reading(self) -> None:
        """Stop reading, so that what the client sends waits in its socket."""

    def resume_reading(self) -> None:
        """Read on."""

    def keep_for_later(self, data: Bytes) -> None:
        """Take bytes behind the request's end."""

    def begin_tunnel(self) -> bytes:
        """Give the bytes kept for later: they belong to the new protocol."""

    def may_persist(self) -> bool:
        """Tell whether the listener wants another request on this connection."""

    def exchange_ended(self, exchange: Exchange, keep: bool) -> None:
        """Go on with the next request, or close."""

    def cut(self) -> None:
        """End the connection so that the client sees its response as incomplete."""

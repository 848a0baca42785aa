"""When a listener has nothing more to do for a client, however the client's bytes are to be read.

A hostile message has no end that two readers would agree on, so no answer can be waited for: what
is waited for is that the mesh has read every byte, and needs more from this client to go on.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import termios
import time
from collections.abc import Callable
from typing import Any

from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.service import Service
from tests.integration.harness import Client

_SECONDS = 20.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds. Raises `TimeoutError` when it does not in time."""
    end = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true in time")
        await asyncio.sleep(0.001)


async def accepted(service: Service, client: Client) -> Downstream[Any]:
    """Wait until the listener has taken the client's connection, and give its end of it."""
    name = client.writer.get_extra_info("sockname")[:2]

    def find() -> Downstream[Any] | None:
        for one in service.connections:
            if isinstance(one, Downstream):
                peer = one.transport.get_extra_info("peername")
                if peer is not None and peer[:2] == name:
                    return one
        return None

    await until(lambda: find() is not None)
    found = find()
    assert found is not None
    return found


async def settled(service: Service, connection: Downstream[Any], client: Client) -> None:
    """Wait until the connection is over, or the mesh waits for more from the client."""
    ours = client.writer.get_extra_info("socket")
    theirs = connection.transport.get_extra_info("socket")

    def quiet() -> bool:
        if connection not in service.connections or connection.transport.is_closing():
            return True
        if client.writer.transport.get_write_buffer_size() or _queued(ours, termios.TIOCOUTQ):
            return not connection._lingering and client.writer.transport.is_closing()
        return not _queued(theirs, termios.FIONREAD) and _waits(connection)

    await until(quiet)


def _queued(sock: socket.socket, what: int) -> int:
    if sock.fileno() < 0:
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), what, count)
    return count[0]


def _waits(connection: Downstream[Any]) -> bool:
    exchange = connection._exchange
    if exchange is None:
        return connection._head_started or connection._lingering or not connection._pending
    return exchange.upstream is not None and not exchange.request_done


def serves_on(connection: Downstream[Any]) -> bool:
    """Tell whether the connection is open and would take the next bytes for a new request."""
    return not (
        connection.transport.is_closing()
        or connection._exchange is not None
        or connection._head_started
        or connection._lingering
    )

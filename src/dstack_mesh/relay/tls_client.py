"""The client's side of TLS: from a connected socket to a protocol that has been told of it."""

from __future__ import annotations

import asyncio
import socket
import ssl

from dstack_mesh.relay.stream import StreamProtocol
from dstack_mesh.relay.tls import TlsTransport
from dstack_mesh.relay.worker import Worker


async def open_tls(
    worker: Worker,
    sock: socket.socket,
    protocol: StreamProtocol,
    context: ssl.SSLContext,
    server_name: str | None,
    session: ssl.SSLSession | None = None,
) -> TlsTransport:
    """Do the client's side of TLS on `sock`, which is connected and non-blocking.

    `protocol` has been told of the connection when this returns. Raises `ssl.SSLError`, or an
    `OSError` where the connection ended. Set a time limit around it: who is cancelled lets go of
    the socket.
    """
    done: asyncio.Future[None] = worker.loop.create_future()

    def wrap(incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        return context.wrap_bio(incoming, outgoing, False, server_name, session)

    def settled(error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    transport = TlsTransport(worker, protocol, wrap, settled, server_side=False)
    try:
        # uvloop's `create_connection` leaves the number of a closed descriptor in `sock` where the
        # connection ends as it begins, and `sock` would close whatever has that number next.
        await worker.loop.connect_accepted_socket(transport.as_protocol, sock)
        await done
    except asyncio.CancelledError:
        done.cancel()  # nobody will ask it
        transport.abort()
        raise
    return transport

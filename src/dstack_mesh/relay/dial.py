"""Opening plain connections: to a guest agent, to a backend, to the gateway before TLS."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable

from dstack_mesh.errors import ConnectFailed, ConnectTimeout, MeshError, UpstreamClosed
from dstack_mesh.listen import KEEPALIVE
from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.upstream import Connector, Upstream

_OPTIONS = (*KEEPALIVE, (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))  # small writes go at once


async def open_socket(loop: asyncio.AbstractEventLoop, address: Address) -> socket.socket:
    """Connect a non-blocking socket, trying each address of a name in turn.

    Raises OSError, with a reason that names the address tried last. Set a time limit around it.
    """
    if isinstance(address, UnixAddress):
        return await _connect(loop, socket.AF_UNIX, address.path)
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    failure: OSError = OSError(f"{address.host} has no address")
    for family, _, _, _, where in found:
        try:
            sock = await _connect(loop, family, where)
        except OSError as error:
            failure = error
        else:
            for option in _OPTIONS:
                sock.setsockopt(*option)
            return sock
    raise failure


async def _connect(loop: asyncio.AbstractEventLoop, family: int, where: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, where)  # type: ignore[arg-type]  # what getaddrinfo gave
    except BaseException:
        sock.close()
        raise
    return sock


class PlainConnector(Connector):
    """Opens plain HTTP connections to one address: the guest agent, or the backend."""

    def __init__(
        self,
        address: Address,
        connect_timeout: float,
        what: str,
        unavailable: Callable[[str], MeshError] | None = None,
    ) -> None:
        """`what` names the other side in errors; `unavailable`, where given, makes all of them."""
        self._address = address
        self._timeout = connect_timeout
        self._what = what
        self._unavailable = unavailable

    async def connect(self, lane: Lane) -> Upstream:
        """See `Connector`."""
        loop = lane.worker.loop
        try:
            async with asyncio.timeout(self._timeout):
                sock = await open_socket(loop, self._address)
                upstream = Upstream(lane)
                await loop.create_connection(upstream.as_protocol, sock=sock)
        except TimeoutError:
            detail = f"{self._what} at {self._address} did not accept within {self._timeout:g} s"
            detail += " (MESH_CONNECT_TIMEOUT)"
            raise (self._unavailable or ConnectTimeout)(detail) from None
        except OSError as error:
            detail = f"{self._what} at {self._address}: {reason(error)}"
            raise (self._unavailable or ConnectFailed)(detail) from error
        upstream.admit(None, 0)
        return upstream

    def lost(self, exc: Exception | None) -> MeshError:
        """See `Connector`."""
        why = f" ({reason(exc)})" if exc is not None else ""
        detail = f"{self._what} at {self._address} closed the connection before answering{why}"
        return (self._unavailable or UpstreamClosed)(detail)

    def generation(self) -> int:
        """See `Connector`: a plain connection does not age with our identity."""
        return 0


def reason(error: BaseException) -> str:
    """Give an error's text for a reader."""
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve ({error.strerror})"
    if isinstance(error, OSError) and error.errno:
        text = os.strerror(error.errno)  # event loops put the address into `strerror`
        if error.errno == errno.EMFILE:
            text += ": this process may open no more; raise the limit (ulimit -n)"
        return text
    return str(error) or type(error).__name__


def authority(address: Address) -> bytes:
    """Give a Host for requests that came without one (HTTP/1.0)."""
    return str(address).encode() if isinstance(address, TcpAddress) else b"localhost"

"""One small call to a service of the platform: a request from memory, an answer into memory.

The guest agent and the gateway are asked rarely, but by a sidecar that has the whole of `wire`
loaded anyway; a client library of its own would cost it 7 MB and a tenth of its start.
"""

from __future__ import annotations

import asyncio
import ssl

from dstack_mesh.errors import MeshError
from dstack_mesh.model import Address
from dstack_mesh.relay.dial import open_socket
from dstack_mesh.wire.translate import Response, ResponseRules

_RULES = ResponseRules(remote_errors=False)


class CallError(Exception):
    """The other side answered, but not with one whole response in bounds; the text says what."""


class Reply(asyncio.Protocol):
    """Sends one request and collects its answer."""

    def __init__(self, request: bytes, method: bytes, limit: int) -> None:
        self._request = request
        self._limit = limit
        self._received = b""
        self._clean_end = False
        # As for an HTTP/1.0 client: no interim responses, and the body without chunks.
        self._response = Response(method, 0, b"", _RULES)
        self.transport: asyncio.BaseTransport | None = None
        self.finished: asyncio.Future[tuple[int, bytes]] = (
            asyncio.get_running_loop().create_future()
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self.transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]  # the loop's own kind of it

    def data_received(self, data: bytes) -> None:
        """Collect the answer."""
        if self.finished.done():
            return
        try:
            self._received += self._response.feed(data)
        except MeshError as error:
            self._fail(error.detail)
            return
        if len(self._received) > self._limit:
            self._fail(f"its answer is larger than {self._limit} bytes")
        elif self._response.done:
            self._finish()

    def eof_received(self) -> None:
        """Note the orderly end, which may be the answer's."""
        self._clean_end = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the connection for the answer's where it can be one."""
        if self.finished.done():
            return
        if self._response.end(self._clean_end and exc is None) is not None:
            self._finish()
        else:
            why = f": {exc}" if exc is not None else ""
            self._fail(f"the connection ended before the answer was complete{why}")

    def _finish(self) -> None:
        body = self._received.partition(b"\r\n\r\n")[2]
        self.finished.set_result((self._response.status, body))

    def _fail(self, detail: str) -> None:
        self.finished.set_exception(CallError(detail))


async def call(
    address: Address,
    method: str,
    target: str,
    *,
    host: str,
    limit: int,
    body: bytes | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, bytes]:
    """Make one call on a connection of its own; give the answer's status and body.

    `body` is JSON. `limit` is the answer's size in bytes, head included. With `tls`, `host` is
    also the server name. Raises OSError (`ssl.SSLError` among them) where there is no connection
    and `CallError` where there is no good answer; a time limit is the caller's to set.
    """
    lines = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n"
    if body is not None:
        lines += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    request = f"{lines}Connection: close\r\n\r\n".encode("latin-1") + (body or b"")
    loop = asyncio.get_running_loop()
    reply = Reply(request, method.encode("ascii"), limit)
    sock = await open_socket(loop, address)
    name = (host if tls else None) or None
    await loop.create_connection(lambda: reply, sock=sock, ssl=tls, server_hostname=name)
    try:
        return await reply.finished
    finally:
        if reply.transport is not None:
            reply.transport.abort()  # type: ignore[attr-defined]  # as above

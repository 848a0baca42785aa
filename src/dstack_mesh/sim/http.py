"""A small HTTP/1.1 server for the simulator's parts: h11 for the protocol, streams for the I/O.

It is not the data plane and shares nothing with it: what it accepts and sends is h11's reading of
the RFCs, so that the two check each other.
"""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import h11

from dstack_mesh.model import Address, TcpAddress
from dstack_mesh.sim.messages import (
    READ_SIZE,
    Duplex,
    Handler,
    HeaderPairs,
    Raw,
    Request,
    Response,
    Upgrade,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterable

_HEAD_LIMIT = 256 * 1024
_DRAIN_LIMIT = 1024 * 1024
"""How much of a body that nobody read is taken in to keep the connection."""


class HttpServer:
    """Serves `handler` on any number of addresses, each request of a connection in turn."""

    def __init__(self, handler: Handler, *, tls: ssl.SSLContext | None = None) -> None:
        self._handler = handler
        self._tls = tls
        self._servers: list[asyncio.Server] = []
        self._sockets: list[Path] = []
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.connections = 0
        """Connections accepted so far."""

    async def start(self, address: Address) -> Address:
        """Listen, and return the address bound. Raises `OSError` where that is not possible.

        A unix socket's path on which somebody answers is not taken over.
        """
        if isinstance(address, TcpAddress):
            return await self.start_tcp(address.host, address.port)
        await refuse_live_socket(address.path)
        server = await asyncio.start_unix_server(
            self._accept, address.path, ssl=self._tls, limit=READ_SIZE
        )
        self._sockets.append(Path(address.path))
        self._servers.append(server)
        return address

    async def start_tcp(self, host: str = "127.0.0.1", port: int = 0) -> TcpAddress:
        """Listen on TCP; port 0 picks a free one. Raises `OSError` where that is not possible."""
        server = await asyncio.start_server(
            self._accept, host, port, ssl=self._tls, limit=READ_SIZE
        )
        self._servers.append(server)
        bound = server.sockets[0].getsockname()
        return TcpAddress(bound[0], bound[1])

    def drop_connections(self) -> None:
        """Cut every open connection without a word."""
        for writer in self._tasks.values():
            writer.transport.abort()

    async def aclose(self) -> None:
        """Stop listening, cut what is open and remove the sockets."""
        for server in self._servers:
            server.close()
        tasks = list(self._tasks)
        self.drop_connections()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for path in self._sockets:
            path.unlink(missing_ok=True)
        self._servers.clear()
        self._sockets.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served in a task")
        self._tasks[task] = writer
        self.connections += 1
        try:
            await _Connection(self._handler, reader, writer).serve()
        except (OSError, EOFError, h11.LocalProtocolError):
            # The peer went away in the middle, or a handler broke off its own body.
            writer.transport.abort()
        except asyncio.CancelledError:
            # `aclose` ended us; nobody is left who would want to know.
            writer.transport.abort()
        finally:
            del self._tasks[task]
            writer.close()
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await writer.wait_closed()


async def refuse_live_socket(path: str) -> None:
    """Raise `OSError` if somebody answers on this unix socket."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    raise OSError(f"{path}: another process answers on this socket; stop it or use another path")


class _Connection:
    """One connection: requests one after another, until one side wants no more."""

    def __init__(
        self, handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._handler = handler
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_LIMIT)

    async def serve(self) -> None:
        try:
            while await self._exchange():
                self._http.start_next_cycle()
        except h11.RemoteProtocolError as error:
            if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                text = f"{error}\n".encode()
                await self._send(error_response(error.error_status_hint, text), head=False)

    async def _exchange(self) -> bool:
        """Serve one request; false where the connection is of no more use."""
        event = await self._next_event()
        if not isinstance(event, h11.Request):
            return False
        trailers: HeaderPairs = []
        request = Request(
            event.method.decode("latin-1"),
            event.target.decode("latin-1"),
            _pairs(event.headers.raw_items()),
            event.http_version.decode("latin-1"),
            self._body(trailers),
            trailers,
        )
        answer = await self._handler(request)
        if isinstance(answer, Raw):
            self._writer.write(answer.data)
            await self._writer.drain()
            return False
        if isinstance(answer, Upgrade):
            await self._upgrade(request, answer)
            return False
        await self._send(answer, head=request.method == "HEAD")
        await self._drain_request()
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                await self._write(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(await self._reader.read(READ_SIZE))
        return event

    async def _body(self, trailers: HeaderPairs) -> AsyncIterator[bytes]:
        while self._http.their_state is h11.SEND_BODY:
            event = await self._next_event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                trailers += _pairs(event.headers.raw_items())

    async def _drain_request(self) -> None:
        """Read what the handler left of the body, within reason."""
        if self._http.they_are_waiting_for_100_continue:
            return
        left = _DRAIN_LIMIT
        while self._http.their_state is h11.SEND_BODY and left > 0:
            event = await self._next_event()
            if isinstance(event, h11.Data):
                left -= len(event.data)

    async def _send(self, answer: Response, *, head: bool) -> None:
        for status, headers in answer.interim:
            await self._write(
                h11.InformationalResponse(status_code=status, headers=_encoded(headers))
            )
        fields = list(answer.headers)
        if isinstance(answer.body, bytes) and not _has_length(fields) and answer.status != 204:
            fields.append(("content-length", str(len(answer.body))))
        reason = _reason(answer.status)
        response = h11.Response(status_code=answer.status, headers=_encoded(fields), reason=reason)
        if isinstance(answer.body, bytes):
            # One write, so that a small answer is one segment.
            data = self._http.send(response) or b""
            if answer.body and not head:
                data += self._http.send(h11.Data(data=answer.body)) or b""
            await self._write(h11.EndOfMessage(headers=_encoded(answer.trailers)), before=data)
            return
        await self._write(response)
        if not head:
            async for chunk in answer.body:
                await self._write(h11.Data(data=chunk))
        await self._write(h11.EndOfMessage(headers=_encoded(answer.trailers)))

    async def _write(self, event: h11.Event, *, before: bytes = b"") -> None:
        self._writer.write(before + (self._http.send(event) or b""))
        await self._writer.drain()

    async def _upgrade(self, request: Request, answer: Upgrade) -> None:
        async for _ in request.body:
            pass
        await self._next_event()  # h11.PAUSED: the client waits for our word
        reason = _reason(101)
        await self._write(
            h11.InformationalResponse(
                status_code=101,
                headers=_encoded([("connection", "upgrade"), *answer.headers]),
                reason=reason,
            )
        )
        early, _ = self._http.trailing_data
        await answer.run(Duplex(self._reader, self._writer, bytes(early)))


def _pairs(items: Iterable[tuple[bytes, bytes]]) -> HeaderPairs:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in items]


def _encoded(pairs: HeaderPairs) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


def _has_length(fields: HeaderPairs) -> bool:
    return any(name.lower() in {"content-length", "transfer-encoding"} for name, _ in fields)


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


def error_response(status: int, text: bytes) -> Response:
    """Build a plain-text error after which the connection is closed."""
    fields = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
    return Response(status, fields, text)

"""An application to be called: it says what reached it, takes and gives bytes, streams and waits.

| path | answer |
|---|---|
| `/` | `hello` |
| `/echo` | JSON of the request: see `echo` |
| `/upload` | JSON: `bytes`, `sha256` and `trailers` of the body, which is not kept |
| `/mirror` | the request's body, as it comes |
| `/download?bytes=N` | N bytes with a length |
| `/download-chunked?bytes=N` | N bytes in chunks, then the trailer `x-sha256` |
| `/download-close?bytes=N` | N bytes until the connection ends (HTTP/1.0) |
| `/cut?bytes=N` | promises twice N bytes and ends the connection after N |
| `/events?n=N&seconds=S` | N server-sent events, S (0) seconds apart |
| `/status/NNN` | that status with a body of one line, if it may have one |
| `/slow?seconds=S` | `hello` after S seconds |
| `/early-hints` | 103, then `hello` |
| `/cookies` | two `set-cookie` fields and one that is not ASCII |
| `/ws` | a WebSocket that says everything back; with `upgrade: echo`, the same for bare bytes |
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from dstack_mesh.model import Address, TcpAddress
from dstack_mesh.sim import websocket
from dstack_mesh.sim.faults import Faults
from dstack_mesh.sim.http import HttpServer
from dstack_mesh.sim.messages import Answer, Duplex, Handler, Raw, Request, Response, Upgrade

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_CHUNK = bytes(range(256)) * 256
_KEPT = 1_000


class Backend(Faults):
    """The application. `Faults` are for tests, and so is `on`, for answers of their own."""

    def __init__(self, name: str = "backend") -> None:
        self.name = name
        """Sent as `x-backend`, to tell backends apart."""

        self.requests: deque[Request] = deque(maxlen=_KEPT)
        """The latest requests' heads (their bodies are read by then)."""

        self._server = HttpServer(self._answer)
        self._handlers: dict[str, Handler] = {
            "/": self._hello,
            "/echo": self.echo,
            "/upload": self._upload,
            "/mirror": self._mirror,
            "/download": self._download,
            "/download-chunked": self._download_chunked,
            "/download-close": self._download_close,
            "/cut": self._cut,
            "/events": self._events,
            "/slow": self._slow,
            "/early-hints": self._early_hints,
            "/cookies": self._cookies,
            "/ws": self._ws,
        }

    async def start(self, address: Address | None = None) -> Address:
        """Listen on `address` (a free port of 127.0.0.1 if none is given); the one bound."""
        return await self._server.start(address or TcpAddress("127.0.0.1", 0))

    async def aclose(self) -> None:
        """Stop listening and cut what is open. It may be started again."""
        await self._server.aclose()

    def drop_connections(self) -> None:
        """Cut every open connection."""
        self._server.drop_connections()

    @property
    def connections(self) -> int:
        """Connections accepted so far."""
        return self._server.connections

    def on(self, path: str, handler: Handler) -> None:
        """Answer this path with `handler` from now on."""
        self._handlers[path] = handler

    async def _answer(self, request: Request) -> Answer:
        self.requests.append(request)
        if (fault := await self.fault()) is not None:
            return fault
        if request.path.startswith("/status/"):
            answer = await self._status(request)
        elif (handler := self._handlers.get(request.path)) is not None:
            answer = await handler(request)
        else:
            answer = _text(404, f"no such path: {request.path}\n")
        if isinstance(answer, Response):
            answer.headers.append(("x-backend", self.name))
        return answer

    async def _hello(self, _: Request) -> Answer:
        return _text(200, "hello\n")

    async def echo(self, request: Request) -> Answer:
        """Tell all that came: headers and trailers as pairs in order, the body by its digest."""
        size, digest = await _consume(request)
        fields = {
            "method": request.method,
            "target": request.target,
            "version": request.http_version,
            "headers": request.headers,
            "trailers": request.trailers,
            "body_bytes": size,
            "body_sha256": digest,
        }
        return _json(fields)

    async def _upload(self, request: Request) -> Answer:
        size, digest = await _consume(request)
        return _json({"bytes": size, "sha256": digest, "trailers": request.trailers})

    async def _mirror(self, request: Request) -> Answer:
        return Response(200, [("content-type", "application/octet-stream")], request.body)

    async def _download(self, request: Request) -> Answer:
        size = int(_number(request, "bytes"))
        return Response(200, [("content-length", str(size)), _BINARY], _bytes(size))

    async def _download_chunked(self, request: Request) -> Answer:
        answer = Response(200, [("trailer", "x-sha256"), _BINARY])
        answer.body = _bytes(int(_number(request, "bytes")), answer)
        return answer

    async def _download_close(self, request: Request) -> Answer:
        size = int(_number(request, "bytes"))
        content = b"".join([chunk async for chunk in _bytes(size)])
        return Raw(b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\n" + content)

    async def _cut(self, request: Request) -> Answer:
        size = int(_number(request, "bytes"))
        content = b"".join([chunk async for chunk in _bytes(size)])
        return Raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (2 * size) + content)

    async def _events(self, request: Request) -> Answer:
        count, seconds = int(_number(request, "n", 3)), _number(request, "seconds")

        async def stream() -> AsyncIterator[bytes]:
            for number in range(1, count + 1):
                yield f"id: {number}\ndata: event {number} of {count}\n\n".encode()
                if number < count and seconds:
                    await asyncio.sleep(seconds)

        headers = [("content-type", "text/event-stream"), ("cache-control", "no-store")]
        return Response(200, headers, stream())

    async def _status(self, request: Request) -> Answer:
        text = request.path.removeprefix("/status/")
        if not (text.isascii() and text.isdigit() and 200 <= int(text) <= 599):
            return _text(400, f"status {text!r} is not a number from 200 to 599\n")
        status = int(text)
        return Response(status) if status in {204, 304} else _text(status, f"status {status}\n")

    async def _slow(self, request: Request) -> Answer:
        await asyncio.sleep(_number(request, "seconds", 1))
        return _text(200, "hello\n")

    async def _early_hints(self, _: Request) -> Answer:
        answer = _text(200, "hello\n")
        answer.interim = [(103, [("link", "</style.css>; rel=preload")])]
        return answer

    async def _cookies(self, _: Request) -> Answer:
        answer = _text(200, "hello\n")
        answer.headers += [("set-cookie", "a=1"), ("set-cookie", "b=2"), ("x-text", "caf\xe9")]
        return answer

    async def _ws(self, request: Request) -> Answer:
        protocol = (request.header("upgrade") or "").lower()
        key = request.header("sec-websocket-key")
        if protocol == "websocket" and key:
            accept = websocket.accept_key(key)
            fields = [("upgrade", "websocket"), ("sec-websocket-accept", accept)]
            return Upgrade(fields, websocket.echo)
        if protocol == "echo":
            return Upgrade([("upgrade", "echo")], _echo_bytes)
        answer = _text(426, "this path speaks `upgrade: websocket` or `upgrade: echo`\n")
        answer.headers.append(("upgrade", "websocket, echo"))
        return answer


_BINARY = ("content-type", "application/octet-stream")


def _text(status: int, text: str) -> Response:
    return Response(status, [("content-type", "text/plain; charset=utf-8")], text.encode())


def _json(fields: dict[str, object]) -> Response:
    return Response(200, [("content-type", "application/json")], json.dumps(fields).encode())


def _number(request: Request, name: str, default: float = 0) -> float:
    """Return a number of the query; what is not one counts as `default`."""
    try:
        return max(0.0, float(parse_qs(request.query)[name][0]))
    except (KeyError, ValueError):
        return default


async def _consume(request: Request) -> tuple[int, str]:
    """Read the body without keeping it; its size and SHA-256."""
    size, digest = 0, hashlib.sha256()
    async for chunk in request.body:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


async def _bytes(size: int, answer: Response | None = None) -> AsyncIterator[bytes]:
    """Give `size` bytes of a repeating pattern; their digest becomes the answer's trailer."""
    digest = hashlib.sha256()
    left = size
    while left > 0:
        chunk = _CHUNK[:left]
        left -= len(chunk)
        if answer is not None:
            digest.update(chunk)
        yield chunk
    if answer is not None:
        answer.trailers.append(("x-sha256", digest.hexdigest()))


async def _echo_bytes(connection: Duplex) -> None:
    while data := await connection.read():
        await connection.write(data)

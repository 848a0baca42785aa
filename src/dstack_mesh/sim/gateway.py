"""A gateway: routes connections by TLS server name without opening them, and tells its domain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import ssl
from collections import Counter
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from dstack_mesh.log import event
from dstack_mesh.model import TcpAddress
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.client_hello import IncompleteHelloError, MalformedHelloError, server_name
from dstack_mesh.sim.faults import Faults
from dstack_mesh.sim.http import HttpServer
from dstack_mesh.sim.messages import Answer, Request, Response

_LOGGER = logging.getLogger(__name__)
_LABEL = re.compile(r"([0-9a-f]{40})-([1-9][0-9]{0,4})s")
_READ_SIZE = 64 * 1024
_HELLO_SECONDS = 10.0
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Route:
    """Where an instance is: its host, and a port only if not the one that the name asks for."""

    host: str
    port: int | None = None


class GatewayInfo(Faults):
    """`GET /prpc/Info` over TLS with a certificate that nobody can verify, like the real one's."""

    def __init__(self, base_domain: str) -> None:
        self.base_domain = base_domain
        self.external_port = 443
        self.requests = 0
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _self_signed(f"gateway.{base_domain}").load_into(context)
        self.server = HttpServer(self._answer, tls=context)

    async def _answer(self, request: Request) -> Answer:
        self.requests += 1
        await request.read()
        if (fault := await self.fault()) is not None:
            return fault
        if request.path != "/prpc/Info" or request.method not in {"GET", "HEAD", "POST"}:
            return Response(404, [("content-type", "text/plain")], b"not found\n")
        fields = {
            "base_domain": self.base_domain,
            "external_port": self.external_port,
            "app_address_ns_prefix": "",
            "version": "simulated",
        }
        return Response(200, [("content-type", "application/json")], json.dumps(fields).encode())


class Gateway:
    """Listens for TLS connections to `{id}-{port}s.{base domain}` and splices their bytes.

    `id` is an app-id or an instance-id. An unknown name or an instance that does not answer ends
    the connection during the handshake, without an alert.
    """

    def __init__(self, base_domain: str) -> None:
        self.base_domain = base_domain
        self.info = GatewayInfo(base_domain)
        """Its `/prpc/Info`, with faults to switch on."""

        self.connections: Counter[str] = Counter()
        """Connections by the server name asked for, refused ones included."""

        self.address = TcpAddress("", 0)
        self.info_url = ""
        """The base URL for `gateway_urls`, known after `start`."""

        self._routes: dict[str, list[Route]] = {}
        self._turn: Counter[str] = Counter()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> TcpAddress:
        """Listen on `host` (the information call on another port of it). Raises `OSError`."""
        self.address = TcpAddress(host, port)
        await self.resume_accepting()
        try:
            info = await self.info.server.start_tcp(host, 0)
        except BaseException:
            await self.stop_accepting()
            raise
        self.info.external_port = self.address.port
        self.info_url = f"https://{TcpAddress(host, info.port)}"
        return self.address

    def add_route(self, identifier: str, host: str, port: int | None = None) -> None:
        """Route an app-id or instance-id to `host`; several hosts of one id take turns.

        With `port`, connections go there instead of the port in the server name.
        """
        routes = self._routes.setdefault(identifier.lower(), [])
        if Route(host, port) not in routes:
            routes.append(Route(host, port))

    def remove_route(self, identifier: str, host: str | None = None) -> None:
        """Forget one host of an id, or the id altogether. Open connections stay."""
        routes = self._routes.pop(identifier.lower(), [])
        kept = [] if host is None else [route for route in routes if route.host != host]
        if kept:
            self._routes[identifier.lower()] = kept

    def drop_connections(self) -> None:
        """Cut every spliced connection, both ends, without a word."""
        for writer in self._writers:
            writer.transport.abort()

    async def stop_accepting(self) -> None:
        """Refuse new connections; open ones stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def resume_accepting(self) -> None:
        """Accept again, on the same port."""
        self._server = await asyncio.start_server(
            self._accept, self.address.host, self.address.port, limit=_READ_SIZE
        )
        self.address = TcpAddress(self.address.host, self._server.sockets[0].getsockname()[1])

    async def aclose(self) -> None:
        """Stop both listeners and cut what is open."""
        await self.stop_accepting()
        tasks = list(self._tasks)
        self.drop_connections()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.info.server.aclose()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served in a task")
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            # Cut by a peer, by a deadline or by `aclose`: the ends see it, no one else needs to.
            pass
        finally:
            self._tasks.discard(task)
            await self._end(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                name, hello = await _read_hello(reader)
        except (MalformedHelloError, EOFError) as error:
            event(_LOGGER, logging.INFO, "gateway_refused", reason=str(error))
            return
        self.connections[name or ""] += 1
        for route, port in self._candidates(name):
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    to_reader, to_writer = await asyncio.open_connection(
                        route.host, port, limit=_READ_SIZE
                    )
            except OSError as error:
                event(_LOGGER, logging.INFO, "gateway_instance_down", to=route.host, error=error)
                continue
            self._writers.add(to_writer)
            try:
                to_writer.write(hello)
                await _splice((reader, writer), (to_reader, to_writer))
            finally:
                await self._end(to_writer)
            return
        event(_LOGGER, logging.INFO, "gateway_refused", reason="no route", server_name=name)

    def _candidates(self, name: str | None) -> list[tuple[Route, int]]:
        """Return the instances to try in turn: each connection begins with the next one."""
        label, _, domain = (name or "").partition(".")
        match = _LABEL.fullmatch(label)
        if match is None or domain != self.base_domain:
            return []
        identifier, port = match[1], int(match[2])
        routes = self._routes.get(identifier, [])
        if not routes or port > 65_535:
            return []
        first = self._turn[identifier] % len(routes)
        self._turn[identifier] += 1
        return [(route, route.port or port) for route in routes[first:] + routes[:first]]

    async def _end(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()


async def _read_hello(reader: asyncio.StreamReader) -> tuple[str | None, bytes]:
    """Read until the ClientHello is complete; its server name and all bytes read."""
    data = b""
    while True:
        chunk = await reader.read(_READ_SIZE)
        if not chunk:
            raise EOFError("the connection ended before a ClientHello")
        data += chunk
        with contextlib.suppress(IncompleteHelloError):
            return server_name(data), data


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _splice(one: _Stream, other: _Stream) -> None:
    """Pass bytes on both ways until both have ended; a reset of one end cuts the other."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_pump(one[0], other[1]))
            group.create_task(_pump(other[0], one[1]))
    except* OSError:
        one[1].transport.abort()
        other[1].transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on, never faster than they are taken, and the end of stream after them."""
    while data := await reader.read(_READ_SIZE):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        with contextlib.suppress(RuntimeError):  # uvloop, where the other end is gone already
            writer.write_eof()


def _self_signed(name: str) -> certs.Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = certs.leaf_name(name)
    extensions = certs.leaf_extensions((name,), server_auth=True, client_auth=False)
    certificate = certs.build(
        subject, subject, key, key, extensions, not_after=certs.in_ten_years()
    )
    return certs.Issued(certs.key_pem(key), (certs.certificate_pem(certificate),))

"""HAProxy as a peer: in front of an h11 server, which gets what HAProxy understood."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

from dstack_mesh.model import TcpAddress
from tests.differential.account import Book, Seen
from tests.differential.daemons import daemon, required
from tests.differential.h11_peer import PORT_HEADER, H11Server
from tests.differential.log_file import LogFile

_CONF = """
global
    log stdout len 65535 format raw local0
    nbthread 1
    tune.bufsize 262144
    tune.http.maxhdr 256
defaults
    mode http
    log global
    timeout connect 10s
    timeout client 60s
    timeout server 60s
    timeout http-request 60s
    timeout http-keep-alive 1h
    retries 0
frontend front
    bind 127.0.0.1:{port}
    {rules}
    default_backend back
backend back
    http-reuse always
    server one {server}
"""

_SEEN = """log-format "%cp %ST %HM %HU"
    http-request set-header {header} %[src_port]"""

_FRONT = "http-request set-header x-dstack-target-app {app_id}"


class HAProxy:
    """HAProxy as the mesh's peer."""

    name = "haproxy"

    def __init__(self, address: TcpAddress, log: Path, behind: H11Server) -> None:
        self.address = address
        self._log = LogFile(log)
        self._behind = behind
        self._seen = Book()
        self._passed: dict[int, int] = defaultdict(int)

    def seen(self, port: int) -> list[Seen]:
        """See `Peer`."""
        self._read()
        return self._seen.seen(port)

    def counts(self) -> dict[int, int]:
        """See `Peer`."""
        self._read()
        return self._seen.counts()

    def _read(self) -> None:
        """Read on in the log: it has every request; the server behind knows the whole ones best."""
        for line in self._log.new_lines():
            number, status, method, target = line.split(" ", 3)
            self._add(int(number), int(status), method, target)

    def _add(self, port: int, status: int, method: str, target: str) -> None:
        if status == 200:
            whole = [one for one in self._behind.seen(port) if one.complete]
            self._seen.add(port, whole[self._passed[port]])
            self._passed[port] += 1
        else:
            names = ("", "") if method == "<BADREQ>" else (method, target)
            self._seen.add(port, Seen(*names, max(status, 0), complete=False))


@contextlib.asynccontextmanager
async def haproxy(directory: Path) -> AsyncIterator[HAProxy]:
    """Run HAProxy as a backend for the block."""
    async with H11Server().running() as behind:
        rules = _SEEN.format(header=PORT_HEADER.decode())
        async with _running(directory, rules, behind.address) as port:
            yield HAProxy(TcpAddress("127.0.0.1", port), directory / "out", behind)


@contextlib.asynccontextmanager
async def haproxy_front(
    directory: Path, mesh: TcpAddress, app_id: str
) -> AsyncIterator[TcpAddress]:
    """Run HAProxy as a client of the mesh's outbound listener; give where it takes requests."""
    async with _running(directory, _FRONT.format(app_id=app_id), mesh) as port:
        yield TcpAddress("127.0.0.1", port)


@contextlib.asynccontextmanager
async def _running(directory: Path, rules: str, server: TcpAddress) -> AsyncIterator[int]:
    binary = required("haproxy")

    def command(ports: list[int]) -> list[str]:
        conf = directory / "haproxy.cfg"
        conf.write_text(_CONF.format(port=ports[0], rules=rules, server=server))
        return [binary, "-db", "-f", str(conf)]

    async with daemon(directory, 1, command) as ports:
        yield ports[0]

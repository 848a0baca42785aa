"""nginx as a peer: it reads requests whole, logs how it understood each, and echoes them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from dstack_mesh.model import TcpAddress
from dstack_mesh.sim.certificates import Issued
from tests.differential.account import Book, Seen
from tests.differential.daemons import daemon, required
from tests.differential.log_file import LogFile

# A body is read to its end, and kept for the log, because it is proxied: to a server that echoes.
_CONF = """
daemon off;
master_process off;
error_log {directory}/error.log info;
pid {directory}/nginx.pid;
events {{}}
http {{
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    log_format seen escape=json '{{"port":$remote_port,"method":"$request_method",'
        '"target":"$request_uri","size":$request_length,"status":$status,"body":"$request_body"}}';
    access_log off;
    client_max_body_size 0;
    client_body_buffer_size 4m;
    large_client_header_buffers 8 128k;
    keepalive_requests 1000000;
    keepalive_timeout 1h;
    proxy_buffer_size 128k;
    proxy_buffers 8 128k;
    proxy_busy_buffers_size 256k;
    proxy_next_upstream off;
    server {{
        listen 127.0.0.1:{echo};
        large_client_header_buffers 8 256k;
        return 200 "$request_method $request_uri\\n";
    }}
    {servers}
}}
"""

_ECHOING = """
    server {{
        listen 127.0.0.1:{port}{tls};
        access_log {directory}/seen.log seen;
        location / {{ proxy_pass http://127.0.0.1:{echo}; }}
    }}
"""

_CERTIFICATES = """ ssl;
        ssl_certificate {directory}/cert.pem;
        ssl_certificate_key {directory}/key.pem;
        ssl_client_certificate {directory}/root.pem;
        ssl_verify_client on;
        ssl_verify_depth 3;
        ssl_protocols TLSv1.3;
        ssl_session_tickets off"""

_FRONT = """
    upstream mesh {{ server {mesh}; keepalive 4; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://mesh;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header x-dstack-target-app {app_id};
        }}
    }}
"""


class Nginx:
    """nginx as the mesh's peer."""

    name = "nginx"

    def __init__(self, address: TcpAddress, log: Path) -> None:
        self.address = address
        self._log = LogFile(log)
        self._seen = Book()

    def seen(self, port: int) -> list[Seen]:
        """See `Peer`."""
        self._read()
        return self._seen.seen(port)

    def counts(self) -> dict[int, int]:
        """See `Peer`."""
        self._read()
        return self._seen.counts()

    def _read(self) -> None:
        for line in self._log.new_lines():
            one = json.loads(line, strict=False)
            self._seen.add(
                one["port"],
                Seen(
                    one["method"],
                    one["target"],
                    one["status"],
                    one["status"] == 200,  # the echo's answer, which only a whole request gets
                    one["size"],
                    one["body"].encode("latin-1"),
                ),
            )


@dataclass(frozen=True)
class Certificates:
    """What a target of the mesh shows, and whom it asks for a certificate."""

    own: Issued
    root_pem: bytes


@contextlib.asynccontextmanager
async def nginx(directory: Path, tls: Certificates | None = None) -> AsyncIterator[Nginx]:
    """Run nginx as a backend, or with `tls` as a target, for the block."""
    extra = ""
    if tls is not None:
        tls.own.write(directory)
        (directory / "root.pem").write_bytes(tls.root_pem)
        extra = _CERTIFICATES.format(directory=directory)

    def servers(ports: list[int]) -> str:
        return _ECHOING.format(directory=directory, port=ports[0], echo=ports[1], tls=extra)

    async with _running(directory, servers) as port:
        yield Nginx(TcpAddress("127.0.0.1", port), directory / "seen.log")


@contextlib.asynccontextmanager
async def nginx_front(directory: Path, mesh: TcpAddress, app_id: str) -> AsyncIterator[TcpAddress]:
    """Run nginx as a client of the mesh's outbound listener; give where it takes requests."""

    def servers(ports: list[int]) -> str:
        return _FRONT.format(mesh=mesh, port=ports[0], app_id=app_id)

    async with _running(directory, servers) as port:
        yield TcpAddress("127.0.0.1", port)


@contextlib.asynccontextmanager
async def _running(directory: Path, servers: Callable[[list[int]], str]) -> AsyncIterator[int]:
    binary = required("nginx")

    def command(ports: list[int]) -> list[str]:
        conf = directory / "nginx.conf"
        text = _CONF.format(directory=directory, echo=ports[1], servers=servers(ports))
        conf.write_text(text)
        return [binary, "-e", "stderr", "-p", str(directory), "-c", str(conf)]

    async with daemon(directory, 2, command) as ports:
        yield ports[0]

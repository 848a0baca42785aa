"""HAProxy as a client proxy: the second peer of the outbound races."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from bench.credentials import Files
from bench.process import Process, eventually, running
from bench.tools import path

_START_SECONDS = 10.0

_CONF = """
global
    nbthread 1
    maxconn 4096
defaults
    mode http
    timeout connect 10s
    timeout client 300s
    timeout server 300s
    option http-no-delay
frontend front
    bind 127.0.0.1:{port} backlog 1024
    default_backend back
backend back
    http-reuse always
    server origin 127.0.0.1:{origin} ssl ssl-min-ver TLSv1.3 crt {both} ca-file {root} \
verify required sni {sni}
"""

ONE = "str(localhost)"
MANY = "req.hdr(x-dstack-target-app),concat(-443s.{domain})"
"""HAProxy keeps connections by the name that it sends, so one server does for many targets."""


@contextlib.contextmanager
def client_proxy(
    directory: Path, port: int, origin_port: int, files: Files, sni: str = ONE
) -> Iterator[Process]:
    """Run HAProxy in front of the origin until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    config, log = directory / "haproxy.cfg", directory / "log"
    config.write_text(
        _CONF.format(port=port, origin=origin_port, both=files.both, root=files.root, sni=sni)
    )
    command = [path("haproxy"), "-db", "-f", str(config)]
    with (
        log.open("wb") as out,
        running(command, "subject", stdout=out, stderr=out) as process,
    ):

        def listens() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"haproxy did not start: {log.read_text()[-500:].strip()}")
            return is_listening(port)

        eventually(listens, _START_SECONDS, f"haproxy does not listen: {log.read_text()}")
        yield Process([process.pid])


def is_listening(port: int) -> bool:
    """Look into the kernel's table instead of connecting, which would be a connection to serve."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        if state == "0A" and int(local.rpartition(":")[2], 16) == port:
            return True
    return False

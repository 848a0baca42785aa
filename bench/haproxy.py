"""HAProxy as a client proxy: the second peer of the outbound races."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
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
    use_backend {choice}
{backends}"""

_BACKEND = """backend {name}
    http-reuse always
    server origin 127.0.0.1:{origin} ssl ssl-min-ver TLSv1.3 crt {both} ca-file {root} \
verify required sni str({host})
"""


@contextlib.contextmanager
def client_proxy(
    directory: Path,
    port: int,
    origin_port: int,
    files: Files,
    hosts: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """Run HAProxy in front of the origin until the block ends.

    With `hosts`, host names by app-id, each app has a backend: with one for all and a name that
    comes from the request, HAProxy 2.6 was seen to keep hardly any connection.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, log = directory / "haproxy.cfg", directory / "log"
    names = {"one": "localhost"} if hosts is None else {f"to_{one}": hosts[one] for one in hosts}
    choice = "one" if hosts is None else "to_%[req.hdr(x-dstack-target-app)]"
    backends = "".join(
        _BACKEND.format(
            name=name, origin=origin_port, both=files.both, root=files.root, host=names[name]
        )
        for name in names
    )
    config.write_text(_CONF.format(port=port, choice=choice, backends=backends))
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

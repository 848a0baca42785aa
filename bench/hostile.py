"""10,000 idle and 1,000 dripping connections: what a well-behaved client notices of them.

Once on the outbound listener, and once on the inbound one, where each connection is TLS with its
handshake done. The limits are raised for it: `MESH_MAX_CONNECTIONS`, and open files to what the
system allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import nginx
from bench.sidecar import Process, sidecar
from bench.small_get import _TARGET, _credentials

RATE = 200
"""Requests a second of the well-behaved client, over eight connections."""

ATTACKERS = 2
"""Processes that hold the hostile connections."""


@dataclass(frozen=True)
class Size:
    idle: int
    dripping: int
    seconds: int


def run(*, short: bool) -> dict[str, Any]:
    if nginx.find() is None:
        return {"skipped": "needs nginx: apt-get install nginx-light"}
    size = Size(200, 20, 1) if short else Size(10_000, 1_000, 10)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = size.idle + size.dripping + 1_000  # and what serving takes, with its reserve
    if hard < needed:
        return {"skipped": f"needs {needed} open files in a process; the limit is {hard}"}
    found = {}
    for direction, race in (("outbound", _outbound), ("inbound", _inbound)):
        with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
            for key, value in race(Path(name), size).items():
                found[f"{direction}: {key}"] = value
    return found


def _limits(size: Size) -> dict[str, str]:
    return {
        "MESH_MAX_CONNECTIONS": str(2 * (size.idle + size.dripping)),
        "MESH_HEAD_TIMEOUT": "10m",
        "MESH_IDLE_TIMEOUT": "10m",
    }


def _outbound(directory: Path, size: Size) -> dict[str, Any]:
    port = nginx.free_port()
    env = _credentials(directory) | {"MESH_GATEWAY": f"fixed/127.0.0.1:{port}"} | _limits(size)
    target = [directory / file for file in ("b.pem", "b.key", "root.pem")]
    with nginx.running(directory / "origin", nginx.origin(port, *target)), sidecar(env) as ours:
        return _race(ours, [ours.bound["outbound"]], size)


def _inbound(directory: Path, size: Size) -> dict[str, Any]:
    port = nginx.free_port()
    backend = f"""server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{ default_type text/plain; return 200 ok; }}
  }}"""
    env = _credentials(directory) | _limits(size)
    env |= {
        "MESH_CERT_FILE": str(directory / "b.pem"),
        "MESH_KEY_FILE": str(directory / "b.key"),
        "MESH_BACKEND": f"127.0.0.1:{port}",
        "MESH_INBOUND_LISTEN": "127.0.0.1:0",
        "MESH_GATEWAY": "fixed/127.0.0.1:1",  # nothing goes there
    }
    caller = [str(directory / file) for file in ("a.pem", "a.key")]
    with nginx.running(directory / "backend", backend), sidecar(env) as ours:
        return _race(ours, [ours.bound["inbound"], *caller], size)


def _race(ours: Process, where: Sequence[str], size: Size) -> dict[str, Any]:
    _measure(where, 1)  # warm-up
    before = _measure(where, size.seconds)
    memory = ours.rss_mb()
    with _attack(where, size):
        held = ours.rss_mb() - memory
        during = _measure(where, size.seconds)
    found: dict[str, Any] = {"connections held": f"{size.idle} idle, {size.dripping} dripping"}
    for key in ("p50", "p99"):
        found[f"{key} without them, ms"] = round(before[key] * 1e3, 2)
        found[f"{key} with them, ms"] = round(during[key] * 1e3, 2)
        found[f"{key}, ratio"] = round(during[key] / before[key], 2)
    found["memory per connection, KB"] = round(held * 1024 / (size.idle + size.dripping), 1)
    return found


def _measure(where: Sequence[str], seconds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.hostile", "measure", str(seconds), *where]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(out))


@contextlib.contextmanager
def _attack(where: Sequence[str], size: Size) -> Iterator[None]:
    shares = [(number, size.idle // ATTACKERS, size.dripping // ATTACKERS) for number in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.hostile", "attack", *map(str, share), *where],
            stdout=subprocess.PIPE,
        )
        for share in shares
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n", "not all connections could be opened"
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# What the child processes do.


def _address(where: Sequence[str]) -> tuple[str, int]:
    host, _, port = where[0].rpartition(":")
    return host, int(port)


def _tls(where: Sequence[str]) -> ssl.SSLContext | None:
    """Make a caller's TLS, where there is a certificate and its key."""
    if len(where) == 1:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # This measures time; who answers is no question here.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(where[1], where[2])
    return context


async def measure(seconds: int, where: Sequence[str]) -> None:
    """Ask at a fixed rate, whether or not answers are late, and print the times they took."""
    connections = 8
    target = b"" if len(where) > 1 else f"x-dstack-target-app: {_TARGET}\r\n".encode()
    ask = b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n" % target
    times: list[float] = []
    streams = [
        await asyncio.open_connection(*_address(where), ssl=_tls(where)) for _ in range(connections)
    ]
    begin = time.perf_counter() + 0.1

    async def one(number: int) -> None:
        reader, writer = streams[number]
        for turn in range(number, RATE * seconds, connections):
            due = begin + turn / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            writer.write(ask)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            await reader.readexactly(2)
            times.append(time.perf_counter() - due)
        writer.close()

    await asyncio.gather(*(one(number) for number in range(connections)))
    parts = statistics.quantiles(times, n=100)
    print(json.dumps({"p50": parts[49], "p99": parts[98]}))


def attack(number: int, idle: int, dripping: int, where: Sequence[str]) -> None:
    """Hold connections: some silent behind one request, some that drip a head byte by byte."""
    tls = _tls(where)
    held: list[socket.socket] = []
    for count in range(idle + dripping):
        # One client address has some 28,000 ports; each thousand connections get their own.
        own = (f"127.1.{number}.{1 + count // 1000}", 0)
        sock = socket.create_connection(_address(where), source_address=own)
        # A server without session tickets answers no handshake's end, so Nagle would wait here.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            sock = tls.wrap_socket(sock)
        if count < idle:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"OK\n"):
                answer += sock.recv(65536)
        else:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Drip: ")
        held.append(sock)
    print("held", flush=True)
    while True:
        for sock in held[idle:]:
            sock.sendall(b"x")
            time.sleep(1 / dripping)  # each of them a byte a second


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if sys.argv[1] == "measure":
        asyncio.run(measure(int(sys.argv[2]), sys.argv[3:]))
    else:
        number, idle, dripping = map(int, sys.argv[2:5])
        attack(number, idle, dripping, sys.argv[5:])


if __name__ == "__main__":
    main()

"""10,000 idle and 1,000 dripping connections: what a well-behaved client notices of them.

The limits are raised for it: `MESH_MAX_CONNECTIONS`, and open files to what the system allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import nginx
from bench.sidecar import Process, sidecar
from bench.small_get import _TARGET, _credentials

RATE = 200
"""Requests a second of the well-behaved client, over eight connections."""


def run(*, short: bool) -> dict[str, Any]:
    if nginx.find() is None:
        return {"skipped": "needs nginx: apt-get install nginx-light"}
    idle, dripping, seconds = (200, 20, 1) if short else (10_000, 1_000, 10)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = idle + dripping + 200
    if hard < needed:
        return {"skipped": f"needs {needed} open files in a process; the limit is {hard}"}
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        directory = Path(name)
        port = nginx.free_port()
        env = _credentials(directory) | {
            "MESH_GATEWAY": f"fixed/127.0.0.1:{port}",
            "MESH_MAX_CONNECTIONS": str(2 * (idle + dripping)),
            "MESH_HEAD_TIMEOUT": "10m",
            "MESH_IDLE_TIMEOUT": "10m",
        }
        target = [directory / file for file in ("b.pem", "b.key", "root.pem")]
        with nginx.running(directory / "origin", nginx.origin(port, *target)), sidecar(env) as ours:
            return _race(ours, idle, dripping, seconds)


def _race(ours: Process, idle: int, dripping: int, seconds: int) -> dict[str, Any]:
    address = ours.bound["outbound"]
    _measure(address, 1)  # warm-up
    before = _measure(address, seconds)
    memory = ours.rss_mb()
    with _attack(address, idle, dripping):
        held = ours.rss_mb() - memory
        during = _measure(address, seconds)
    found: dict[str, Any] = {"connections held": f"{idle} idle, {dripping} dripping"}
    for key in ("p50", "p99"):
        found[f"{key} without them, ms"] = round(before[key] * 1e3, 2)
        found[f"{key} with them, ms"] = round(during[key] * 1e3, 2)
        found[f"{key}, ratio"] = round(during[key] / before[key], 2)
    found["memory per connection, KB"] = round(held * 1024 / (idle + dripping), 1)
    return found


def _measure(address: str, seconds: int) -> dict[str, float]:
    out = _child("measure", address, str(seconds))
    return dict(json.loads(out))


@contextlib.contextmanager
def _attack(address: str, idle: int, dripping: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.hostile", "attack", address, str(idle), str(dripping)],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n", "not all connections could be opened"
        yield
    finally:
        process.kill()
        process.wait()


def _child(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.hostile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# What the child processes do.


async def measure(address: str, seconds: int) -> None:
    """Ask at a fixed rate, whether or not answers are late, and print the times they took."""
    host, _, port = address.rpartition(":")
    connections = 8
    ask = f"GET / HTTP/1.1\r\nHost: a\r\nx-dstack-target-app: {_TARGET}\r\n\r\n".encode()
    times: list[float] = []
    begin = time.perf_counter() + 0.1

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
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


async def attack(address: str, idle: int, dripping: int) -> None:
    """Hold connections: some silent behind one request, some that drip a head byte by byte."""
    host, _, port = address.rpartition(":")
    writers = []
    for number in range(idle + dripping):
        # One client address has some 28,000 ports; each thousand connections get their own.
        own = (f"127.1.0.{1 + number // 1000}", 0)
        reader, writer = await asyncio.open_connection(host, int(port), local_addr=own)
        if number < idle:
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"OK\n")
        else:
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nX-Drip: ")
        writers.append(writer)
    print("held", flush=True)
    while True:
        for writer in writers[idle:]:
            writer.write(b"x")
            await asyncio.sleep(1 / dripping)  # each of them a byte a second


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    what, address, *numbers = sys.argv[1:]
    part = {"measure": measure, "attack": attack}[what]
    asyncio.run(part(address, *map(int, numbers)))


if __name__ == "__main__":
    main()

"""The load over mutual TLS, as a process of its own: `python -m bench.mtls_client SPEC`.

wrk and h2load can't show a certificate, and a proxy between them and the subject would need more
CPU than the subject does. SPEC is JSON: `address`, `connections`, `headers` (field lines for each
request), and for TLS `cert`, `key` and `root`. It opens the connections and writes the line `{}`.
For each line of JSON that it then reads, it does something and answers with a line: see `ask`,
`rate`, `connect` and `burst` in `Client`.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from bench.mtls_connection import Connection

VARIED = 20_000
"""Different requests that are made in advance: more than any bounded memo holds."""

_OPENING = 32
_BURSTING = 16
_BURST = 1 << 20


class ResumingContext(ssl.SSLContext):
    """Offers the newest session that was got with it; uvloop has no parameter for one."""

    session: ssl.SSLSession | None = None

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return super().wrap_bio(*args, **{**kwargs, "session": self.session})


class Client:
    """The connections to one subject, and what can be done over them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        host, _, port = spec["address"].rpartition(":")
        self._host, self._port = host, int(port)
        self._tls = _context(spec) if "cert" in spec else None
        self._connections: list[Connection] = []
        self._fields = "".join(f"{field}\r\n" for field in spec["headers"])
        self._varied: list[bytes] = []

    async def open(self, count: int) -> None:
        self._connections = await _gather(count, _OPENING, lambda _: self._one())

    async def _one(self) -> Connection:
        loop = asyncio.get_running_loop()
        name = "localhost" if self._tls else None
        _, connection = await loop.create_connection(
            Connection, self._host, self._port, ssl=self._tls, server_hostname=name
        )
        return connection

    async def ask(self, seconds: float, path: str = "/", varied: bool = False) -> dict[str, Any]:
        """Ask over and over on every connection; give how many `requests` in how many `seconds`."""
        if varied and not self._varied:
            self._varied = [_varied_get() for _ in range(VARIED)]
        requests = self._varied if varied else [self._get(path)]
        begin = time.perf_counter()
        for number, connection in enumerate(self._connections):
            connection.repeat(requests, number * len(requests) // len(self._connections))
        await asyncio.sleep(seconds)
        counts = [await connection.stop() for connection in self._connections]
        return {"requests": sum(counts), "seconds": time.perf_counter() - begin}

    async def rate(self, rate: int, seconds: float) -> dict[str, Any]:
        """Ask `rate` times a second; give the milliseconds that each answer took."""
        text = self._get("/")
        tasks, times = set(), []
        idle = list(self._connections)

        async def one(connection: Connection) -> None:
            sent = time.perf_counter()
            await connection.exchange(text)
            times.append((time.perf_counter() - sent) * 1e3)
            idle.append(connection)

        begin = time.perf_counter()
        done = 0
        while done < rate * seconds:
            due = int((time.perf_counter() - begin) * rate)
            while done < due and idle:
                done += 1
                task = asyncio.ensure_future(one(idle.pop(0)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        return {"times": times, "seconds": time.perf_counter() - begin}

    async def connect(self, seconds: float, resume: bool = False) -> dict[str, Any]:
        """Open, ask once and close, one after the other; give `connections` and `resumed`."""
        context = self._tls
        assert isinstance(context, ResumingContext)
        context.session = None
        end = time.perf_counter() + seconds
        count = resumed = 0
        while time.perf_counter() < end:
            connection = await self._one()
            await connection.exchange(self._get("/"))
            session, reused = connection.session()
            if resume:
                context.session = session
            resumed += reused
            count += 1
            await connection.close()
        context.session = None
        return {"connections": count, "resumed": resumed}

    async def burst(self) -> dict[str, Any]:
        """Carry 1 MB over each connection: up on every other one, down on the rest."""
        head = f"POST /sink HTTP/1.1\r\nHost: localhost\r\nContent-Length: {_BURST}\r\n"
        up, down = f"{head}{self._fields}\r\n".encode() + bytes(_BURST), self._get("/1m")

        async def one(number: int) -> None:
            await self._connections[number].exchange(up if number % 2 else down)

        await _gather(len(self._connections), _BURSTING, one)
        return {"connections": len(self._connections)}

    def _get(self, path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{self._fields}\r\n".encode()


def _context(spec: dict[str, Any]) -> ssl.SSLContext:
    context = ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(spec["root"])
    context.load_cert_chain(spec["cert"], spec["key"])
    return context


async def _gather(count: int, at_once: int, one: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """Do `one` for each number below `count`, no more than `at_once` at a time."""
    results: list[Any] = [None] * count
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            results[number] = await one(number)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return results


_FIXED = "\r\n".join(
    [
        "Host: shop.example.test",
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)",
        "Accept: application/json, text/plain;q=0.9, */*;q=0.5",
        "Accept-Language: en-GB,en;q=0.9,de;q=0.8",
        *(f"X-Fixed-{number}: value of field number {number}" for number in range(12)),
    ]
)


def _varied_get() -> bytes:
    """Make a GET as `bench/lua/varied.lua` does: six of its fields, and its length, are random."""
    trace, cookie = f"{random.getrandbits(128):032x}", f"{random.getrandbits(600):0150x}"
    return (
        f"GET /orders/{random.randrange(10**8)}/items/{trace[: random.randint(4, 20)]}"
        f"?page={random.randrange(10**4)}&sort={trace[5:12]} HTTP/1.1\r\n{_FIXED}\r\n"
        f"traceparent: 00-{trace}-{trace[8:24]}-01\r\nx-request-id: {trace[3:30]}\r\n"
        f"cookie: session={cookie[: random.randint(30, 150)]}; seen={random.randrange(10**7)}\r\n"
        f"x-note: {cookie[: random.randint(1, 100)]}\r\n\r\n"
    ).encode()


async def serve(spec: dict[str, Any]) -> None:
    """Open the connections, then do what standard input says until it ends."""
    client = Client(spec)
    await client.open(spec["connections"])
    loop = asyncio.get_running_loop()
    print("{}", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        answer = await getattr(client, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(serve(json.loads(sys.argv[1])))

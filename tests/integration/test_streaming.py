"""Bodies of any size in constant memory, events at once, and nobody drowned by a fast sender."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import h11
import pytest

from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Answer as SimAnswer
from dstack_mesh.sim.messages import Request, Response
from dstack_mesh.sim.world import World
from tests.integration.harness import Client, Mesh, Wire, mesh, mesh_before, problem, request
from tests.integration.processes import SidecarProcess, sidecar_process

MIB = 1024 * 1024
SIZE = 100 * MIB
MAX_GROWTH = 16 * MIB
MAX_IN_FLIGHT = 4 * MIB


def pieces(size: int) -> Iterator[bytes]:
    """Give `size` bytes no two parts of which are alike, in pieces that fit no buffer's size."""
    base = hashlib.shake_256(b"content").digest(100_003)
    number = 0
    while size:
        piece = (number.to_bytes(8, "big") + base)[: min(size, len(base))]
        number += 1
        size -= len(piece)
        yield piece


DIGEST = hashlib.sha256()
for _piece in pieces(SIZE):
    DIGEST.update(_piece)


@contextlib.asynccontextmanager
async def two_processes(
    directory: Path, backend: Backend
) -> AsyncIterator[tuple[World, SidecarProcess, SidecarProcess]]:
    """Run the sidecars of `a` and `b`, the latter with `backend`, as processes."""
    async with World(["a", "b"], directory) as world:
        a, b = world.apps["a"], world.apps["b"]
        backend_address = str(await backend.start())
        try:
            async with (
                sidecar_process(a.directory, a.env) as caller,
                sidecar_process(b.directory, {**b.env, "MESH_BACKEND": backend_address}) as target,
            ):
                yield world, caller, target
        finally:
            await backend.aclose()


async def source(one: Request) -> SimAnswer:
    """Give SIZE bytes, with a length if the query says so."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces(SIZE):
            yield piece

    return Response(200, [("content-length", str(SIZE))] if one.query else [], body())


async def download(client: Client) -> tuple[int, str]:
    """Read a response's body without keeping it: its size and digest."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
    parser.send(h11.EndOfMessage())
    size, digest = 0, hashlib.sha256()
    while not isinstance(event := parser.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            parser.receive_data(await client.reader.read(MIB))
        elif isinstance(event, h11.Data):
            size += len(event.data)
            digest.update(event.data)
        else:
            assert isinstance(event, h11.Response)
            assert event.status_code == 200
    return size, digest.hexdigest()


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_100_mb_in_constant_memory(tmp_path: Path, way: str, framing: str) -> None:
    backend = Backend("b")
    backend.on("/source", source)
    async with two_processes(tmp_path, backend) as (world, caller, target):
        fields = [("x-dstack-target-app", world.apps["b"].app_id)]
        async with asyncio.timeout(50), Client.connect(caller.address("outbound")) as client:
            await client.send(request("POST", "/upload", fields, b"warm"))
            assert (await client.answer("POST")).status == 200
            before = [one.memory()[0] for one in (caller, target)]
            if way == "down":
                query = "?length" if framing == "length" else ""
                await client.send(request("GET", f"/source{query}", fields))
                assert await download(client) == (SIZE, DIGEST.hexdigest())
            else:
                how = (
                    ("Content-Length", str(SIZE))
                    if framing == "length"
                    else ("Transfer-Encoding", "chunked")
                )
                await client.send(request("POST", "/upload", [*fields, how]))
                for piece in pieces(SIZE):
                    chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
                    await client.send(piece if framing == "length" else chunk)
                if framing == "chunked":
                    await client.send(b"0\r\n\r\n")
                seen = json.loads((await client.answer("POST")).body)
                assert (seen["bytes"], seen["sha256"]) == (SIZE, DIGEST.hexdigest())
            for one, was in zip((caller, target), before, strict=True):
                growth = one.memory()[1] - was
                assert growth < MAX_GROWTH, f"{growth / MIB:.1f} MiB"


async def test_1000_events_are_each_passed_on_at_once(pair: Mesh) -> None:
    """The backend sends the next one only when the client has the last: a held one would hang."""
    count = 1000
    received: asyncio.Queue[int] = asyncio.Queue()

    async def events(_: Request) -> SimAnswer:
        async def stream() -> AsyncIterator[bytes]:
            for number in range(count):
                yield b"id: %d\ndata: event\n\n" % number
                assert await received.get() == number

        return Response(200, [("content-type", "text/event-stream")], stream())

    pair.backends["b"].on("/one-by-one", events)
    fields = [("x-dstack-target-app", pair.app_id("b"))]
    async with asyncio.timeout(30), Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/one-by-one", fields))
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
        parser.send(h11.EndOfMessage())
        seen = 0
        text = b""
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                parser.receive_data(await client.reader.read(65536))
            elif isinstance(event, h11.Data):
                text += event.data
                while b"\n\n" in text:
                    one, _, text = text.partition(b"\n\n")
                    assert one.startswith(b"id: %d\n" % seen)
                    received.put_nowait(seen)
                    seen += 1
        assert seen == count


async def test_a_head_is_passed_on_before_its_body(pair: Mesh) -> None:
    go = asyncio.Event()

    async def slow(_: Request) -> SimAnswer:
        async def body() -> AsyncIterator[bytes]:
            await go.wait()
            yield b"late"

        return Response(200, [("content-length", "4")], body())

    pair.backends["b"].on("/late", slow)
    async with Client.connect(pair.outbound("a")) as client:
        fields = [("x-dstack-target-app", pair.app_id("b"))]
        await client.send(request("GET", "/late", fields))
        assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        go.set()
        assert await client.until(b"late") == b"late"


def in_the_kernel() -> int:
    """Count the bytes in the send and receive queues of all of this process's TCP sockets.

    They are the system's to bound (net.ipv4.tcp_wmem, tcp_rmem), not the mesh's.
    """
    descriptors = Path("/proc/self/fd").iterdir()
    links = [str(one.readlink()) for one in descriptors if one.is_symlink()]
    own = {link[8:-1] for link in links if link.startswith("socket:[")}
    total = 0
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        columns = line.split()
        if columns[9] in own:
            sending, _, receiving = columns[4].partition(":")
            total += int(sending, 16) + int(receiving, 16)
    return total


async def others_go_on(pair: Mesh, stalled: list[int]) -> None:
    """Call while the other one is stalled, until `stalled[0]` has not moved for 50 calls."""
    still, last = 0, -1
    async with asyncio.timeout(20), Client.connect(pair.outbound("a")) as client:
        while still < 50:
            fields = [("x-dstack-target-app", pair.app_id("b"))]
            await client.send(request("GET", "/", fields))
            assert (await client.answer()).body == b"hello\n"
            still = still + 1 if stalled[0] == last else 0
            last = stalled[0]


async def test_a_client_that_does_not_read_stops_the_sender(pair: Mesh) -> None:
    sent = [0]
    cancelled = asyncio.Event()

    async def endless(_: Request) -> SimAnswer:
        async def body() -> AsyncIterator[bytes]:
            piece = bytes(64 * 1024)
            try:
                while True:
                    sent[0] += len(piece)
                    yield piece
            finally:
                cancelled.set()

        return Response(200, [], body())

    pair.backends["b"].on("/endless", endless)
    where = pair.outbound("a")
    with socket.create_connection((where.host, where.port)) as silent:
        fields = [("x-dstack-target-app", pair.app_id("b"))]
        silent.sendall(request("GET", "/endless", fields))
        await others_go_on(pair, sent)
        held = sent[0] - in_the_kernel()
        assert sent[0] > 0
        assert held < MAX_IN_FLIGHT, f"{held / MIB:.1f} MiB of {sent[0] / MIB:.1f} are held"
    # And once it has gone the backend learns of it, although nobody was reading.
    async with asyncio.timeout(10):
        await cancelled.wait()


async def test_a_backend_that_does_not_read_stops_the_upload(tmp_path: Path) -> None:
    taken = asyncio.Event()
    release = asyncio.Event()

    async def serve(wire: Wire) -> None:
        head = await wire.head()
        if head.startswith(b"GET"):
            while head:
                await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello\n")
                head = await wire.head()
        taken.set()
        await release.wait()

    async with mesh_before(tmp_path, serve) as (pair, _):
        sent = [0]

        async def upload(client: Client) -> None:
            fields = [("x-dstack-target-app", pair.app_id("b"))]
            await client.send(request("POST", "/", [*fields, ("Transfer-Encoding", "chunked")]))
            piece = bytes(64 * 1024)
            while True:
                await client.send(b"10000\r\n%b\r\n" % piece)
                sent[0] += len(piece)

        async with Client.connect(pair.outbound("a")) as client:
            uploading = asyncio.create_task(upload(client))
            async with asyncio.timeout(10):
                await taken.wait()
            await others_go_on(pair, sent)
            held = sent[0] - in_the_kernel()
            assert sent[0] > 0
            assert held < MAX_IN_FLIGHT, f"{held / MIB:.1f} MiB of {sent[0] / MIB:.1f} are held"
            # The sender learns that the backend has gone away.
            release.set()
            problem(await client.answer("POST"), "upstream_closed", 502)
            uploading.cancel()
            await asyncio.gather(uploading, return_exceptions=True)


async def test_a_slow_reader_gets_everything(pair: Mesh) -> None:
    """Pausing and resuming many times loses and doubles nothing."""
    size = 8 * MIB

    async def source(_: Request) -> SimAnswer:
        async def body() -> AsyncIterator[bytes]:
            for piece in pieces(size):
                yield piece

        return Response(200, [], body())

    pair.backends["b"].on("/big", source)
    loop = asyncio.get_running_loop()
    where = pair.outbound("a")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setblocking(False)
        await loop.sock_connect(sock, (where.host, where.port))
        fields = [("x-dstack-target-app", pair.app_id("b"))]
        await loop.sock_sendall(sock, request("GET", "/big", fields, version="1.0"))
        data = bytearray()
        async with asyncio.timeout(30):
            while piece := await loop.sock_recv(sock, 16 * 1024):
                data += piece
    body = bytes(data).partition(b"\r\n\r\n")[2]
    assert body == b"".join(pieces(size))


@contextlib.contextmanager
def refusing_backend() -> Iterator[str]:
    """Listen as a server that answers 413 to a head, and closes with the body unread: a reset."""
    answer = (
        b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 8\r\n\r\ntoo much"
    )

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                received = b""
                while b"\r\n\r\n" not in received and (data := connection.recv(4096)):
                    received += data
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield "{}:{}".format(*listener.getsockname())
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


async def test_an_early_answer_is_not_lost_to_the_reset_behind_it(tmp_path: Path) -> None:
    """The rest of the body meets the reset, often before the answer was read."""
    with refusing_backend() as address:
        async with mesh(tmp_path) as one:
            await one.start("a", backend=False)
            await one.start("b", MESH_BACKEND=address)
            for _ in range(20):
                answer = await one.call("a", "b", "POST", body=b"x" * 3_000_000)
                assert (answer.status, answer.body) == (413, b"too much"), answer

"""Upgrades: WebSocket and others become a byte relay, where the target agrees."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.integration.harness import (
    Client,
    Mesh,
    Wire,
    eventually,
    mesh,
    mesh_before,
    problem,
    request,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
MIB = 1024 * 1024


def upgrading(pair: Mesh, protocol: str = "echo", **fields: str) -> bytes:
    """Write the request for an upgrade."""
    return request(
        "GET",
        "/ws",
        [
            ("x-dstack-target-app", pair.app_id("b")),
            ("Connection", "keep-alive, Upgrade"),
            ("Upgrade", protocol),
            *fields.items(),
        ],
    )


@contextlib.asynccontextmanager
async def web_socket(
    tmp_path: Path, answer: Callable[[ServerConnection], object]
) -> AsyncIterator[tuple[Mesh, ClientConnection]]:
    """Connect a client and a server of the `websockets` library through two sidecars."""
    async with (
        serve(answer, "127.0.0.1", 0, max_size=32 * MIB, subprotocols=["one", "two"]) as server,  # type: ignore[arg-type, list-item]
        mesh(tmp_path) as pair,
    ):
        host, port = next(iter(server.sockets)).getsockname()[:2]
        await pair.start("a", backend=False)
        await pair.start("b", backend=True, MESH_BACKEND=f"{host}:{port}")
        async with connect(
            f"ws://{pair.outbound('a')}/chat?room=1",
            additional_headers={"x-dstack-target-app": pair.app_id("b")},
            subprotocols=["two"],  # type: ignore[list-item]
            max_size=32 * MIB,
            proxy=None,
        ) as client:
            yield pair, client


async def say_back(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def test_text_binary_fragments_and_a_large_message(tmp_path: Path) -> None:
    async with web_socket(tmp_path, say_back) as (_, client), asyncio.timeout(30):
        assert client.subprotocol == "two"
        await client.send("h\u00e9llo")
        assert await client.recv() == "h\u00e9llo"
        await client.send(bytes(range(256)))
        assert await client.recv() == bytes(range(256))
        await client.send("")
        assert await client.recv() == ""
        await client.send(["one ", "two ", "three"])
        assert await client.recv() == "one two three"
        large = os.urandom(16 * MIB)
        await client.send(large)
        assert await client.recv() == large


async def test_ping_and_pong_both_ways(tmp_path: Path) -> None:
    async def ping(connection: ServerConnection) -> None:
        await (await connection.ping(b"from the server"))
        await connection.send("pong came")
        await connection.wait_closed()

    async with web_socket(tmp_path, ping) as (_, client), asyncio.timeout(10):
        assert await client.recv() == "pong came"
        assert await (await client.ping(b"from the client")) >= 0


async def test_close_codes_both_ways(tmp_path: Path) -> None:
    closed: asyncio.Queue[tuple[int | None, str | None]] = asyncio.Queue()

    async def close(connection: ServerConnection) -> None:
        if await connection.recv() == "you":
            await connection.close(4001, "done")
        await connection.wait_closed()
        closed.put_nowait((connection.close_code, connection.close_reason))

    async with asyncio.timeout(10):
        async with web_socket(tmp_path / "1", close) as (_, client):
            await client.send("you")
            with pytest.raises(ConnectionClosed):
                await client.recv()
            assert (client.close_code, client.close_reason) == (4001, "done")
            await closed.get()
        async with web_socket(tmp_path / "2", close) as (_, client):
            await client.send("me")
            await client.close(4002, "enough")
            assert await closed.get() == (4002, "enough")


async def test_many_web_sockets_at_once(tmp_path: Path) -> None:
    async with web_socket(tmp_path, say_back) as (pair, _):

        async def talk(number: int) -> None:
            async with connect(
                f"ws://{pair.outbound('a')}/",
                additional_headers={"x-dstack-target-app": pair.app_id("b")},
                subprotocols=["one"],  # type: ignore[list-item]
                proxy=None,
            ) as client:
                for turn in range(5):
                    await client.send(f"{number} {turn}")
                    assert await client.recv() == f"{number} {turn}"

        async with asyncio.timeout(30):
            await asyncio.gather(*(talk(number) for number in range(20)))


async def test_the_simulated_backend_speaks_it_too(pair: Mesh) -> None:
    async with (
        asyncio.timeout(10),
        connect(
            f"ws://{pair.outbound('a')}/ws",
            additional_headers={"x-dstack-target-app": pair.app_id("b")},
            compression=None,
            proxy=None,
        ) as client,
    ):
        await client.send("hello")
        assert await client.recv() == "hello"
    head = pair.backends["b"].requests[-1]
    assert (head.header("upgrade"), head.header("connection")) == ("websocket", "Upgrade")
    assert head.header("x-dstack-app-id") == pair.app_id("a")


# With bare bytes.


async def test_bytes_right_behind_the_handshake(pair: Mesh) -> None:
    """They are sent before it is known that the target agrees, and arrive after it does."""
    async with Client.connect(pair.outbound("a")) as client:
        early = os.urandom(100_000)
        await client.send(upgrading(pair) + early)
        data = await client.until(b"\r\n\r\n")
        head, _, got = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"upgrade: echo" in head.lower()
        assert b"connection: upgrade" in head.lower()
        async with asyncio.timeout(10):
            got += await client.reader.readexactly(len(early) - len(got))
        assert got == early


async def test_bytes_right_behind_the_targets_answer(tmp_path: Path) -> None:
    async def serve_bytes(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCH + b"first words")
        await wire.to_end()

    async with (
        mesh_before(tmp_path, serve_bytes) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(upgrading(pair))
        assert (await client.until(b"first words")).endswith(b"\r\n\r\nfirst words")


async def test_what_a_client_says_last_arrives(tmp_path: Path) -> None:
    """All of it, although it closes at once and the target reads slowly."""
    said = os.urandom(3 * MIB)
    go = asyncio.Event()

    async def serve_bytes(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCH)
        await go.wait()
        await wire.to_end()

    async with mesh_before(tmp_path, serve_bytes) as (pair, backend):
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(upgrading(pair))
            await client.until(b"\r\n\r\n")
            sending = asyncio.create_task(client.send(said))
            await asyncio.wait([sending], timeout=0.2)
            go.set()
            await sending
        wire = backend.wires[0]
        await eventually(lambda: wire.ended)
        assert wire.received.partition(b"\r\n\r\n")[2] == said


async def test_what_a_target_says_last_arrives(tmp_path: Path) -> None:
    said = os.urandom(3 * MIB)

    async def serve_bytes(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCH + said)

    async with (
        mesh_before(tmp_path, serve_bytes) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(upgrading(pair))
        async with asyncio.timeout(10):
            data = await client.closed()
        assert data.partition(b"\r\n\r\n")[2] == said


async def test_when_one_side_goes_the_other_does(tmp_path: Path) -> None:
    async def serve_bytes(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCH)
        await wire.to_end()

    async with mesh_before(tmp_path, serve_bytes) as (pair, backend):
        for reset in (False, True):
            async with Client.connect(pair.outbound("a")) as client:
                await client.send(upgrading(pair))
                await client.until(b"\r\n\r\n")
                wire = backend.wires[-1]
                if reset:
                    client.reset()
                else:
                    client.writer.close()
                await eventually(lambda w=wire: w.ended)  # type: ignore[misc]
        for reset in (False, True):
            async with Client.connect(pair.outbound("a")) as client:
                await client.send(upgrading(pair))
                await client.until(b"\r\n\r\n")
                if reset:
                    backend.wires[-1].reset()
                else:
                    backend.wires[-1].finish()
                async with asyncio.timeout(10):
                    assert await client.closed() == b""


async def test_a_tunnel_is_never_pooled(tmp_path: Path) -> None:
    async def serve_bytes(wire: Wire) -> None:
        while b"Upgrade" not in await wire.head():
            await wire.send(OK)
        await wire.send(SWITCH)
        await wire.to_end()

    async with mesh_before(tmp_path, serve_bytes) as (pair, backend):
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(upgrading(pair))
            await client.until(b"\r\n\r\n")
            assert (await pair.call("a", "b")).body == b"ok"
            assert len(backend.wires) == 2
        await eventually(lambda: backend.wires[0].ended)
        assert (await pair.call("a", "b")).body == b"ok"
        assert len(backend.wires) == 2


async def test_an_idle_tunnel_stays(tmp_path: Path) -> None:
    """Neither the idle nor the response timeout is about it."""
    async with mesh(tmp_path) as pair:
        short = {"MESH_IDLE_TIMEOUT": "200ms", "MESH_RESPONSE_TIMEOUT": "200ms"}
        await pair.start("a", backend=False, **short)
        await pair.start("b", **short)
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(upgrading(pair))
            await client.until(b"\r\n\r\n")
            async with Client.connect(pair.outbound("a")) as idle:
                await idle.closed()
                async with Client.connect(pair.outbound("a")) as idle_again:
                    await idle_again.closed()
            await client.send(b"still here")
            assert await client.until(b"still here") == b"still here"


# What is not agreed on.


@pytest.mark.parametrize(
    "refusal",
    [
        OK,
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 426 Upgrade Required\r\nUpgrade: other\r\nContent-Length: 2\r\n\r\nno",
    ],
)
async def test_a_refused_upgrade_leaves_the_connection(tmp_path: Path, refusal: bytes) -> None:
    async def serve_one(wire: Wire) -> None:
        while True:
            await wire.send(refusal if b"Upgrade" in await wire.head() else OK)

    async with (
        mesh_before(tmp_path, serve_one) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        for _ in range(2):
            await client.send(upgrading(pair))
            answer = await client.answer()
            assert answer.status == int(refusal[9:12])
            assert answer.get(b"connection") is None
            await client.send(request("GET", "/", [("x-dstack-target-app", pair.app_id("b"))]))
            assert (await client.answer()).body == b"ok"
        assert len(backend.wires) == 1


async def test_a_web_socket_client_learns_of_a_refusal(pair: Mesh) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(
            f"ws://{pair.outbound('a')}/echo",
            additional_headers={"x-dstack-target-app": pair.app_id("b")},
            proxy=None,
        )
    assert refused.value.response.status_code == 200
    with pytest.raises(InvalidStatus) as refused:
        await connect(
            f"ws://{pair.outbound('a')}/ws",
            additional_headers={"x-dstack-target-app": "0" * 40},
            proxy=None,
        )
    assert refused.value.response.headers["x-dstack-mesh-error"] == "tls_failed"


@pytest.mark.parametrize(
    ("offered", "arrives"),
    [
        ("h2c", None),
        ("H2C", None),
        ("TLS/1.0", None),
        ("HTTP/2.0", None),
        ("h2c, websocket", "websocket"),
        ("websocket", "websocket"),
    ],
)
async def test_what_would_hide_requests_is_not_offered(
    pair: Mesh, offered: str, arrives: str | None
) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        fields = [
            ("x-dstack-target-app", pair.app_id("b")),
            ("Connection", "Upgrade, HTTP2-Settings"),
            ("Upgrade", offered),
            ("HTTP2-Settings", "AAMAAABkAAQAAP__"),
        ]
        await client.send(request("GET", "/echo", fields))
        assert (await client.answer()).status == 200
    seen = pair.backends["b"].requests[-1]
    assert seen.header("upgrade") == arrives
    assert seen.header("http2-settings") is None


async def test_an_upgrade_that_connection_does_not_list_is_none(pair: Mesh) -> None:
    fields = [("x-dstack-target-app", pair.app_id("b")), ("Upgrade", "websocket")]
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/echo", fields))
        assert (await client.answer()).status == 200
    assert pair.backends["b"].requests[-1].header("upgrade") is None


@pytest.mark.parametrize(
    "switch",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo, h2c\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
)
@pytest.mark.parametrize("asked", [True, False])
async def test_a_switch_that_was_not_asked_for(tmp_path: Path, switch: bytes, asked: bool) -> None:
    async def serve_one(wire: Wire) -> None:
        await wire.head()
        await wire.send(switch)
        await wire.to_end()

    async with (
        mesh_before(tmp_path, serve_one) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        plain = request("GET", "/", [("x-dstack-target-app", pair.app_id("b"))])
        await client.send(upgrading(pair) if asked else plain)
        problem(await client.answer(), "upstream_protocol_error", 502)
        await eventually(lambda: backend.wires[0].ended)

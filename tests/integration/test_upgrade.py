"""Upgrades: after a 101 both ends have a connection of bare bytes, and before it nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request as WsRequest
from websockets.http11 import Response as WsResponse
from websockets.typing import Subprotocol

from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    Wire,
    answers,
    eventually,
    mesh,
    mesh_before,
    problem,
    request,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
UPGRADE = [("Connection", "Upgrade"), ("Upgrade", "echo")]
MIB = 1024 * 1024
DEADLINE = 20.0


def to_b(pair: Mesh) -> tuple[str, str]:
    return ("x-dstack-target-app", pair.app_id("b"))


def asking(pair: Mesh, target: str = "/ws", method: str = "GET", body: bytes = b"") -> bytes:
    """Write a request for an upgrade to `echo`."""
    return request(method, target, [to_b(pair), *UPGRADE], body)


def dial(pair: Mesh, path: str = "/ws", *, deflate: bool = False) -> connect:
    """Connect a WebSocket to b through both sidecars."""
    return connect(
        f"ws://{pair.outbound('a')}{path}",
        additional_headers=dict([to_b(pair)]),
        compression="deflate" if deflate else None,
        proxy=None,
        max_size=None,
        open_timeout=DEADLINE,
        close_timeout=DEADLINE,
    )


@contextlib.asynccontextmanager
async def mesh_before_websocket(
    tmp_path: Path,
    handler: Callable[[ServerConnection], Awaitable[None]],
    process_request: Callable[[ServerConnection, WsRequest], WsResponse | None] | None = None,
    subprotocols: list[Subprotocol] | None = None,
) -> AsyncIterator[Mesh]:
    """Open a mesh of `a` and `b`, where `b`'s backend is a WebSocket server."""
    server = await serve(
        handler,
        "127.0.0.1",
        0,
        max_size=None,
        process_request=process_request,
        subprotocols=subprotocols,
    )
    port = server.sockets[0].getsockname()[1]
    try:
        async with mesh(tmp_path) as one:
            await one.start("a", backend=False)
            await one.start("b", MESH_BACKEND=f"127.0.0.1:{port}")
            yield one
    finally:
        server.close()
        await server.wait_closed()


async def say_back(connection: ServerConnection) -> None:
    """Say every message back in the fragments that it came in."""
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            fragments: list[str | bytes] = [one async for one in connection.recv_streaming()]
            await connection.send(fragments if len(fragments) > 1 else fragments[0])


# WebSockets.


async def hold_a_talk(ws: ClientConnection) -> None:
    """Send one of everything and have it back."""
    async with asyncio.timeout(DEADLINE):
        for message in ("", "text é", b"", bytes(range(256)), "x" * 126, b"y" * 65_536):
            await ws.send(message)
            assert await ws.recv() == message
        await ws.send(["first ", "second ", "third"])
        assert await ws.recv() == "first second third"
        await (await ws.ping(b"here"))


@pytest.mark.parametrize("deflate", [False, True])
async def test_a_websocket_to_a_server(tmp_path: Path, deflate: bool) -> None:
    async with (
        mesh_before_websocket(tmp_path, say_back) as pair,
        dial(pair, "/a/../b?c=d", deflate=deflate) as ws,
    ):
        assert bool(ws.protocol.extensions) is deflate
        await hold_a_talk(ws)


async def test_a_websocket_to_the_simulators_backend(pair: Mesh) -> None:
    async with dial(pair) as ws:
        await hold_a_talk(ws)
    assert pair.backends["b"].requests[-1].header("x-dstack-app-id") == pair.app_id("a")


async def test_fragments_stay_fragments(tmp_path: Path) -> None:
    async with mesh_before_websocket(tmp_path, say_back) as pair, dial(pair) as ws:
        async with asyncio.timeout(DEADLINE):
            await ws.send([b"a" * 10, b"b" * 100_000, b"c"])
            back = [len(one) async for one in ws.recv_streaming()]
            assert [size for size in back if size] == [10, 100_000, 1]


async def test_a_fragment_is_passed_on_before_the_next(tmp_path: Path) -> None:
    """Nothing waits for a message to be complete."""
    came: asyncio.Queue[str | bytes] = asyncio.Queue()

    async def listen(connection: ServerConnection) -> None:
        async for fragment in connection.recv_streaming():
            came.put_nowait(fragment)
        await connection.wait_closed()

    async with mesh_before_websocket(tmp_path, listen) as pair, dial(pair) as ws:
        seen: list[str | bytes] = []

        async def fragments() -> AsyncIterator[str]:
            for text in ("one", "two", "three"):
                yield text
                seen.append(await came.get())

        await asyncio.wait_for(ws.send(fragments()), DEADLINE)
        assert seen == ["one", "two", "three"]


async def test_pings_both_ways(tmp_path: Path) -> None:
    answered = asyncio.Event()

    async def ping(connection: ServerConnection) -> None:
        await (await connection.ping(b"are you there"))
        answered.set()
        await connection.wait_closed()

    async with mesh_before_websocket(tmp_path, ping) as pair, dial(pair) as ws:
        async with asyncio.timeout(DEADLINE):
            await answered.wait()
            await (await ws.ping(b"and you"))


async def test_a_message_of_16_mb(tmp_path: Path) -> None:
    message = bytes(range(256)) * (16 * MIB // 256)
    async with mesh_before_websocket(tmp_path, say_back) as pair, dial(pair) as ws:
        async with asyncio.timeout(2 * DEADLINE):
            await ws.send(message)
            assert await ws.recv() == message


async def test_a_message_of_16_mb_to_the_simulators_backend(pair: Mesh) -> None:
    message = bytes(range(256)) * (16 * MIB // 256)
    async with dial(pair) as ws, asyncio.timeout(2 * DEADLINE):
        await ws.send(message)
        assert await ws.recv() == message


async def test_close_codes_from_the_client(tmp_path: Path) -> None:
    closed: asyncio.Queue[tuple[int | None, str | None]] = asyncio.Queue()

    async def wait(connection: ServerConnection) -> None:
        await connection.wait_closed()
        closed.put_nowait((connection.close_code, connection.close_reason))

    async with mesh_before_websocket(tmp_path, wait) as pair:
        async with dial(pair) as ws:
            await ws.close(4001, "going home")
        assert await asyncio.wait_for(closed.get(), DEADLINE) == (4001, "going home")
        async with dial(pair) as ws:
            ws.transport.abort()
        assert await asyncio.wait_for(closed.get(), DEADLINE) == (1006, "")


async def test_close_codes_from_the_server(tmp_path: Path) -> None:
    async def close(connection: ServerConnection) -> None:
        assert connection.request is not None
        if connection.request.path == "/abort":
            connection.transport.abort()
        else:
            await connection.send("last words")
            await connection.close(4002, "closing time")

    async with mesh_before_websocket(tmp_path, close) as pair:
        async with dial(pair) as ws:
            assert await asyncio.wait_for(ws.recv(), DEADLINE) == "last words"
            with pytest.raises(websockets.ConnectionClosedError) as caught:
                await asyncio.wait_for(ws.recv(), DEADLINE)
            assert caught.value.rcvd is not None
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4002, "closing time")
        async with dial(pair, "/abort") as ws:
            with pytest.raises(websockets.ConnectionClosedError) as caught:
                await asyncio.wait_for(ws.recv(), DEADLINE)
            assert caught.value.rcvd is None


async def test_a_handshake_that_the_server_refuses(tmp_path: Path) -> None:
    def refuse(connection: ServerConnection, _: WsRequest) -> WsResponse:
        return connection.respond(401, "who are you\n")

    async with mesh_before_websocket(tmp_path, say_back, refuse) as pair:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await dial(pair)
        assert caught.value.response.status_code == 401
        assert caught.value.response.body == b"who are you\n"


async def test_a_handshake_to_an_app_that_is_not_there(pair: Mesh) -> None:
    with pytest.raises(websockets.InvalidStatus) as caught:
        await connect(
            f"ws://{pair.outbound('a')}/ws",
            additional_headers={"x-dstack-target-app": "0" * 40},
            proxy=None,
        )
    assert caught.value.response.status_code == 502
    assert caught.value.response.headers["x-dstack-mesh-error"] == "tls_failed"


# Bare bytes.


@pytest.mark.parametrize("size", [5, 100_000, 2 * MIB])
async def test_bytes_right_behind_the_handshake_arrive(pair: Mesh, size: int) -> None:
    """They are the new protocol's, on a fresh connection to the target and on a pooled one."""
    data = bytes(range(251)) * (size // 251) + b"z" * (size % 251)
    for _ in range(2):
        async with Client.connect(pair.outbound("a")) as client, asyncio.timeout(DEADLINE):
            sending = asyncio.create_task(client.send(asking(pair) + data))
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            assert b"\r\nupgrade: echo\r\n" in head.lower()
            assert b"\r\nconnection: upgrade\r\n" in head.lower()
            assert await client.reader.readexactly(size) == data
            await sending
        assert (await pair.call("a", "b")).status == 200


async def test_bytes_behind_the_handshake_and_its_body(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(asking(pair, method="POST", body=b"a body") + b"not of the body")
        assert (await client.until(b"not of the body")).startswith(b"HTTP/1.1 101 ")


async def test_what_the_backend_sends_right_behind_its_101_arrives(tmp_path: Path) -> None:
    async def greet(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCHED + b"welcome")
        await wire.to_end()

    async with (
        mesh_before(tmp_path, greet) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(asking(pair))
        assert (await client.until(b"welcome")).endswith(b"\r\n\r\nwelcome")


async def test_the_backend_may_talk_first_and_one_sided(tmp_path: Path) -> None:
    """Nothing waits for an answer from the other side."""

    async def count(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCHED)
        for number in range(100):
            await wire.send(b"%d\n" % number)
        assert await wire.until(b"done") == b"done"
        await wire.send(b"bye")

    async with (
        mesh_before(tmp_path, count) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
        asyncio.timeout(DEADLINE),
    ):
        await client.send(asking(pair))
        await client.until(b"\n99\n")
        await client.send(b"done")
        assert await client.closed() == b"bye"


async def test_a_client_that_closes_ends_the_backends_side(tmp_path: Path) -> None:
    """What it sent last arrives first."""
    ended: asyncio.Queue[bytes] = asyncio.Queue()
    data = b"x" * MIB + b"the last"

    async def take(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCHED)
        size = len(wire.received)
        await wire.to_end()
        ended.put_nowait(wire.received[size:])

    async with mesh_before(tmp_path, take) as (pair, _):
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(asking(pair))
            await client.until(b"\r\n\r\n")
            await client.send(data)
        assert await asyncio.wait_for(ended.get(), DEADLINE) == data
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(asking(pair))
            await client.until(b"\r\n\r\n")
            client.reset()
        assert await asyncio.wait_for(ended.get(), DEADLINE) == b""


async def test_a_client_that_ends_its_half_before_the_switch_ends_the_backends_side(
    tmp_path: Path,
) -> None:
    """It cannot be told by a half-close (TLS has none here), and must not be kept for ever."""
    ended: asyncio.Queue[bytes] = asyncio.Queue()
    asked, half = asyncio.Event(), asyncio.Event()

    async def take(wire: Wire) -> None:
        await wire.head()
        asked.set()
        await half.wait()
        await wire.send(SWITCHED)
        size = len(wire.received)
        await wire.to_end()
        ended.put_nowait(wire.received[size:])

    async with (
        mesh_before(tmp_path, take) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(asking(pair))
        await asyncio.wait_for(asked.wait(), DEADLINE)
        client.writer.write_eof()
        # Another exchange through the same loop: by its end the FIN has been seen.
        assert (await pair.call("a", None, path="/health")).status == 200
        half.set()
        assert await asyncio.wait_for(ended.get(), DEADLINE) == b""
        async with asyncio.timeout(DEADLINE):
            assert (await client.closed()).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("hard", [False, True])
async def test_a_backend_that_closes_ends_the_clients_side(tmp_path: Path, hard: bool) -> None:
    """What it sent last arrives first, unless it was cut."""
    data = b"y" * MIB + b"the last"

    async def leave(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCHED)
        await wire.until(b"go")
        if hard:
            wire.reset()
        else:
            await wire.send(data)

    async with (
        mesh_before(tmp_path, leave) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
        asyncio.timeout(DEADLINE),
    ):
        await client.send(asking(pair))
        await client.until(b"\r\n\r\n")
        await client.send(b"go")
        assert await client.closed() == (b"" if hard else data)


async def test_a_tunnel_is_never_used_again(pair: Mesh) -> None:
    """Neither connection of it goes back into a pool."""
    for _ in range(2):
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(asking(pair) + b"ping")
            await client.until(b"ping")
    before = pair.backends["b"].connections
    assert before == 2
    assert (await pair.call("a", "b")).status == 200
    assert pair.backends["b"].connections == before + 1


async def test_a_quiet_tunnel_outlives_every_timeout(tmp_path: Path) -> None:
    """Open streams are watched by TCP keep-alive instead."""
    short = {"MESH_IDLE_TIMEOUT": "300ms", "MESH_RESPONSE_TIMEOUT": "300ms"}
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False, **short, MESH_HEAD_TIMEOUT="300ms")
        await one.start("b", backend=True, **short, MESH_HEAD_TIMEOUT="300ms")
        async with Client.connect(one.outbound("a")) as client:
            await client.send(asking(one) + b"early")
            await client.until(b"early")
            for _ in range(2):
                async with Client.connect(one.outbound("a")) as idle, asyncio.timeout(DEADLINE):
                    assert await idle.closed() == b""
            await client.send(b"late")
            assert await client.until(b"late") == b"late"


# Refused, not asked for, not passed on.


@pytest.mark.parametrize("status", [200, 400, 404, 426, 500])
async def test_a_refused_upgrade_leaves_a_usable_connection(pair: Mesh, status: int) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        for _ in range(2):
            await client.send(asking(pair, f"/status/{status}"))
            answer = await client.answer()
            assert (answer.status, answer.error) == (status, "")
            assert answer.body == f"status {status}\n".encode()
            await client.send(request("GET", "/", [to_b(pair)]))
            assert (await client.answer()).body == b"hello\n"
    assert pair.backends["b"].connections <= 2, "the backend may hang up, the mesh does not"
    asked = pair.backends["b"].requests[0]
    assert (asked.header("upgrade"), asked.header("connection")) == ("echo", "Upgrade")


async def test_a_request_behind_a_refused_upgrade_is_a_request(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(asking(pair, "/status/400") + request("GET", "/", [to_b(pair)]))
        assert (await client.answer()).status == 400
        assert (await client.answer()).body == b"hello\n"


async def echoed(pair: Mesh, fields: list[tuple[str, str]], version: str = "1.1") -> Answer:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/echo", [to_b(pair), *fields], version=version))
        return await client.answer()


def names_of(answer: Answer) -> dict[str, str]:
    """Give the fields that came to the backend, by lower-case name."""
    assert answer.status == 200
    return {name.lower(): value for name, value in json.loads(answer.body)["headers"]}


@pytest.mark.parametrize("protocol", ["h2c", "H2C", "h2", "h3", "HTTP/2.0", "TLS/1.0"])
async def test_upgrades_that_would_hide_requests_are_not_passed_on(
    pair: Mesh, protocol: str
) -> None:
    fields = [
        ("Connection", "Upgrade, HTTP2-Settings"),
        ("Upgrade", protocol),
        ("HTTP2-Settings", "AAMAAABkAAQCAAAAAAIAAAAA"),
    ]
    came = names_of(await echoed(pair, fields))
    assert not came.keys() & {"upgrade", "http2-settings", "connection"}


async def test_the_other_protocols_offered_are_passed_on(pair: Mesh) -> None:
    fields = [("Connection", "upgrade"), ("Upgrade", "h2c, foo/1"), ("Upgrade", "echo")]
    came = names_of(await echoed(pair, fields))
    assert (came["upgrade"], came["connection"].lower()) == ("foo/1, echo", "upgrade")


async def test_an_upgrade_without_its_connection_option_is_not_one(pair: Mesh) -> None:
    """RFC 9110 7.8: it was meant for somebody else."""
    assert "upgrade" not in names_of(await echoed(pair, [("Upgrade", "echo")]))


async def test_an_upgrade_over_http_1_0_is_ignored(pair: Mesh) -> None:
    """RFC 9110 7.8."""
    came = names_of(await echoed(pair, UPGRADE, version="1.0"))
    assert not came.keys() & {"upgrade", "connection"}


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ([], SWITCHED),
        (UPGRADE, SWITCHED.replace(b"echo", b"other")),
        (UPGRADE, SWITCHED.replace(b"echo", b"echo, other")),
        (UPGRADE, SWITCHED.replace(b"Upgrade: echo\r\n", b"")),
        (UPGRADE, SWITCHED.replace(b"Connection: upgrade\r\n", b"")),
        ([("Upgrade", "echo")], SWITCHED),
        ([("Connection", "Upgrade"), ("Upgrade", "h2c")], SWITCHED.replace(b"echo", b"h2c")),
    ],
    ids=["none", "other", "more", "unnamed", "no option", "not asked", "h2c"],
)
async def test_a_switch_that_was_not_asked_for(
    tmp_path: Path, asked: list[tuple[str, str]], answer: bytes
) -> None:
    async def serve_once(wire: Wire) -> None:
        head = await wire.head()
        await wire.send(OK if b"/next" in head else answer + b"HTTP/1.1 200 OK\r\n\r\nsmuggled")
        await wire.to_end()

    async with (
        mesh_before(tmp_path, serve_once) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(request("GET", "/", [to_b(pair), *asked]))
        refused = await client.answer()
        problem(refused, "upstream_protocol_error", 502)
        assert refused.error.endswith("; remote")
        await client.send(request("GET", "/next", [to_b(pair)]))
        assert (await client.answer()).body == b"ok"


async def test_a_switch_over_http_1_0_was_not_asked_for(tmp_path: Path) -> None:
    async with (
        mesh_before(tmp_path, answers(SWITCHED)) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(request("GET", "/", [to_b(pair), *UPGRADE], version="1.0"))
        problem(await client.answer(), "upstream_protocol_error", 502)


async def test_a_switch_before_the_requests_end(tmp_path: Path) -> None:
    """Where one protocol ends and the next begins could not be told any more."""

    async def hasty(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCHED)
        await wire.to_end()

    async with (
        mesh_before(tmp_path, hasty) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
        asyncio.timeout(DEADLINE),
    ):
        fields = [to_b(pair), *UPGRADE, ("Content-Length", "10")]
        await client.send(request("POST", "/", fields) + b"half ")
        assert b"101" not in (await client.closed()).partition(b"\r\n")[0]


# More of it: deflate, ends that are no closing handshake, offers.


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_16_mib_to_the_simulated_backend(pair: Mesh, compression: str | None) -> None:
    """Which knows no extension: what the client offers is not agreed on, and it goes on without."""
    large = bytes(range(256)) * (16 * MIB // 256)
    async with (
        asyncio.timeout(40),
        connect(
            f"ws://{pair.outbound('a')}/ws",
            additional_headers={"x-dstack-target-app": pair.app_id("b")},
            compression=compression,
            max_size=None,
            proxy=None,
        ) as client,
    ):
        await client.send(large)
        assert await client.recv() == large


async def test_a_web_socket_cut_without_a_closing_handshake(tmp_path: Path) -> None:
    """RFC 6455 7.1.5: the other end's code is then 1006."""
    closed: asyncio.Queue[int | None] = asyncio.Queue()

    async def cut(connection: ServerConnection) -> None:
        if await connection.recv() == "you":
            connection.transport.abort()
        await connection.wait_closed()
        closed.put_nowait(connection.close_code)

    async with mesh_before_websocket(tmp_path, cut) as pair, asyncio.timeout(DEADLINE):
        async with dial(pair) as client:
            await client.send("you")
            with pytest.raises(websockets.ConnectionClosed) as ended:
                await client.recv()
            assert ended.value.rcvd is None
            await closed.get()
        async with dial(pair) as client:
            await client.send("me")
            client.transport.abort()
            assert await closed.get() == 1006


@pytest.mark.parametrize("size", [1, 2 * MIB])
async def test_bytes_behind_the_handshake_on_fresh_and_pooled_connections(
    pair: Mesh, size: int
) -> None:
    early = (bytes(range(256)) * (size // 256 + 1))[:size]
    for _ in range(2):
        async with Client.connect(pair.outbound("a")) as client, asyncio.timeout(20):
            sending = asyncio.create_task(client.send(asking(pair) + early))
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            assert await client.reader.readexactly(size) == early
            await sending
        assert (await pair.call("a", "b")).status == 200


async def test_offers_on_several_lines(pair: Mesh) -> None:
    fields = [("Connection", "upgrade"), ("Upgrade", "h2c, foo/1"), ("Upgrade", "echo")]
    answer = await pair.call("a", "b", path="/echo", headers=fields)
    assert answer.status == 200
    seen = pair.backends["b"].requests[-1]
    assert [v for k, v in seen.headers if k.lower() == "upgrade"] == ["foo/1, echo"]


@pytest.mark.parametrize(
    ("version", "asked", "switch"),
    [
        ("1.0", UPGRADE, SWITCHED),
        ("1.1", [("Upgrade", "echo")], SWITCHED),
        ("1.1", [], SWITCHED),
        (
            "1.1",
            [("Connection", "Upgrade"), ("Upgrade", "h2c")],
            SWITCHED.replace(b"echo", b"h2c"),
        ),
    ],
    ids=["over 1.0", "no option", "nothing asked", "h2c"],
)
async def test_a_switch_to_what_was_not_passed_on(
    tmp_path: Path, version: str, asked: list[tuple[str, str]], switch: bytes
) -> None:
    """Nothing behind it is taken for an answer, and the next request works."""

    async def serve_one(wire: Wire) -> None:
        smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsmuggled"
        await wire.send(OK if b"/next" in await wire.head() else switch + smuggled)
        await wire.to_end()

    async with (
        mesh_before(tmp_path, serve_one) as (pair, _),
        Client.connect(pair.outbound("a")) as client,
    ):
        target = ("x-dstack-target-app", pair.app_id("b"))
        await client.send(request("GET", "/", [target, *asked], version=version))
        refused = await client.answer()
        problem(refused, "upstream_protocol_error", 502)
        assert refused.error.endswith("; remote")
        assert (await pair.call("a", "b", path="/next")).body == b"ok"


# Many at once, the last words, and the pool beside a tunnel.


async def test_many_web_sockets_at_once(tmp_path: Path) -> None:
    """Each with a subprotocol that both ends agree on, and none with another's messages."""

    async def talk(pair: Mesh, number: int) -> None:
        async with connect(
            f"ws://{pair.outbound('a')}/",
            additional_headers=dict([to_b(pair)]),
            subprotocols=[Subprotocol("two")],
            proxy=None,
        ) as ws:
            assert ws.subprotocol == "two"
            for turn in range(5):
                await ws.send(f"{number} {turn}")
                assert await ws.recv() == f"{number} {turn}"

    spoken = [Subprotocol("one"), Subprotocol("two")]
    async with (
        mesh_before_websocket(tmp_path, say_back, subprotocols=spoken) as pair,
        asyncio.timeout(2 * DEADLINE),
    ):
        await asyncio.gather(*(talk(pair, number) for number in range(20)))


async def test_what_a_client_says_last_arrives(tmp_path: Path) -> None:
    """All of it, although it closes at once and the target reads slowly."""
    said = os.urandom(3 * MIB)
    go = asyncio.Event()

    async def serve_bytes(wire: Wire) -> None:
        await wire.head()
        await wire.send(SWITCHED)
        await go.wait()
        await wire.to_end()

    async with mesh_before(tmp_path, serve_bytes) as (pair, backend):
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(asking(pair))
            await client.until(b"\r\n\r\n")
            sending = asyncio.create_task(client.send(said))
            await asyncio.wait([sending], timeout=0.2)
            go.set()
            await sending
        wire = backend.wires[0]
        await eventually(lambda: wire.ended)
        assert wire.received.partition(b"\r\n\r\n")[2] == said


async def test_a_tunnel_is_never_pooled(tmp_path: Path) -> None:
    async def serve_bytes(wire: Wire) -> None:
        while b"Upgrade" not in await wire.head():
            await wire.send(OK)
        await wire.send(SWITCHED)
        await wire.to_end()

    async with mesh_before(tmp_path, serve_bytes) as (pair, backend):
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(asking(pair))
            await client.until(b"\r\n\r\n")
            assert (await pair.call("a", "b")).body == b"ok"
            assert len(backend.wires) == 2
        await eventually(lambda: backend.wires[0].ended)
        assert (await pair.call("a", "b")).body == b"ok"
        assert len(backend.wires) == 2


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
            await client.send(asking(pair))
            answer = await client.answer()
            assert answer.status == int(refusal[9:12])
            assert answer.get(b"connection") is None
            await client.send(request("GET", "/", [("x-dstack-target-app", pair.app_id("b"))]))
            assert (await client.answer()).body == b"ok"
        assert len(backend.wires) == 1

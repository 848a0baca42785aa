"""WebSocket (RFC 6455) end to end: the `websockets` client, two sidecars, the `websockets` server.

Both ends are a strict implementation that is not ours. What one sends the other has to get, frame
by frame; what one of them does wrong the other has to see, and close with the code that fits.
`test_upgrade.py` has the upgrade itself; here is what is spoken after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.upstream import Upstream
from tests.integration.harness import Mesh, eventually, mesh

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1024 * 1024
LARGE = 16 * MIB
DEADLINE = 30.0

Handler = Callable[[ServerConnection], Awaitable[None]]
Ended = tuple[int | None, str | None]


@dataclass
class Talk:
    """A mesh whose `b` has a WebSocket server as its backend; a test sets what it does."""

    mesh: Mesh
    handlers: dict[str, Handler] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    ended: asyncio.Queue[Ended] = field(default_factory=asyncio.Queue)
    """How each connection came to its end, as the server saw it."""

    def dial(self, path: str = "/echo", **options: Any) -> connect:
        settings: dict[str, Any] = {
            "compression": None,
            "max_size": None,
            "proxy": None,
            "open_timeout": DEADLINE,
            "close_timeout": DEADLINE,
            "ping_interval": None,
        }
        settings.update(options)
        headers = Headers(settings.pop("additional_headers", {}))
        headers["x-dstack-target-app"] = self.mesh.app_id("b")
        url = f"ws://{self.mesh.outbound('a')}{path}"
        return connect(url, additional_headers=headers, **settings)

    async def served(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.requests.append(connection.request)
        path = connection.request.path.partition("?")[0]
        try:
            await self.handlers.get(path, echo)(connection)
            await connection.wait_closed()
        except websockets.ConnectionClosed:
            pass
        finally:
            self.ended.put_nowait((connection.close_code, connection.close_reason))

    async def how_it_ended(self) -> Ended:
        return await asyncio.wait_for(self.ended.get(), DEADLINE)


async def echo(connection: ServerConnection) -> None:
    """Say each message back in the fragments that it came in."""
    while True:
        fragments = [one async for one in connection.recv_streaming()]
        await connection.send(fragments if len(fragments) > 1 else fragments[0])


def process_request(connection: ServerConnection, request: Request) -> Response | None:
    status = request.path.removeprefix("/refuse/")
    if status == request.path:
        return None
    response = connection.respond(http.HTTPStatus(int(status)), f"no, {status}\n")
    if status.startswith("3"):
        response.headers["Location"] = "/echo"
    if status == "401":
        response.headers["WWW-Authenticate"] = 'Basic realm="x"'
    return response


@contextlib.asynccontextmanager
async def talking(tmp_path: Path, **options: Any) -> AsyncIterator[Talk]:
    settings: dict[str, Any] = {"max_size": None, "ping_interval": None, "compression": "deflate"}
    settings.update(options)
    async with mesh(tmp_path) as one:
        talk = Talk(one)
        server = await serve(
            talk.served, "127.0.0.1", 0, process_request=process_request, **settings
        )
        try:
            port = server.sockets[0].getsockname()[1]
            await one.start("a", backend=False)
            await one.start("b", MESH_BACKEND=f"127.0.0.1:{port}")
            yield talk
        finally:
            server.close()
            await server.wait_closed()


def choose(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Take the newest there is; none where none is asked for."""
    spoken = (Subprotocol("chat.v2"), Subprotocol("chat.v1"))
    found = next((one for one in spoken if one in offered), None)
    if found is None and offered:
        raise websockets.NegotiationError("no subprotocol in common")
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Talk]:
    async with talking(tmp_path_factory.mktemp("world"), select_subprotocol=choose) as one:
        yield one


@pytest.fixture
def talk(shared: Talk) -> Talk:
    shared.handlers.clear()
    shared.requests.clear()
    while not shared.ended.empty():
        shared.ended.get_nowait()
    return shared


# Messages.

SIZES = [0, 1, 125, 126, 127, 1_000, 65_535, 65_536, 65_537, 300_000, MIB + 1]
"""Around the ends of what each length form of a frame can say (RFC 6455 5.2)."""

COMPRESSION = pytest.mark.parametrize("compression", [None, "deflate"], ids=["plain", "deflate"])


@COMPRESSION
@pytest.mark.parametrize("size", SIZES)
async def test_messages_of_every_length_form(
    talk: Talk, size: int, compression: str | None
) -> None:
    binary = os.urandom(size)
    text = ("aé漢😀" * (size // 10 + 1)).encode()[:size].decode(errors="ignore")
    async with asyncio.timeout(DEADLINE), talk.dial(compression=compression) as ws:
        assert bool(ws.protocol.extensions) is (compression is not None)
        for message in (binary, text, binary):
            await ws.send(message)
            back = await ws.recv()
            assert type(back) is type(message)
            assert back == message


@COMPRESSION
@pytest.mark.parametrize("kind", ["text", "binary"])
async def test_16_mib_both_ways(talk: Talk, kind: str, compression: str | None) -> None:
    block = os.urandom(256 * 1024) if kind == "binary" else b"0123456789abcdef" * 16_384
    data = block * (LARGE // len(block))
    message = data if kind == "binary" else data.decode()
    async with asyncio.timeout(2 * DEADLINE), talk.dial(compression=compression) as ws:
        await ws.send(message)
        assert await ws.recv() == message
        await ws.send("and a small one")
        assert await ws.recv() == "and a small one"


async def test_16_mib_both_ways_at_once(talk: Talk) -> None:
    """Neither side waits for the other to have sent."""
    ours, theirs = os.urandom(MIB) * 16, os.urandom(MIB) * 16
    came: list[str] = []

    async def both(connection: ServerConnection) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(connection.send(theirs))
            message = await connection.recv(decode=False)
            came.append(hashlib.sha256(message).hexdigest())

    talk.handlers["/both"] = both
    async with asyncio.timeout(2 * DEADLINE), talk.dial("/both") as ws:
        async with asyncio.TaskGroup() as group:
            group.create_task(ws.send(ours))
            assert await ws.recv() == theirs
        await eventually(lambda: bool(came), DEADLINE)
    assert came == [hashlib.sha256(ours).hexdigest()]


@COMPRESSION
async def test_many_small_messages_stay_in_order(talk: Talk, compression: str | None) -> None:
    async with asyncio.timeout(DEADLINE), talk.dial(compression=compression) as ws:
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(send_all(ws, [f"message {n}" for n in range(3_000)]))
            for number in range(3_000):
                assert await ws.recv() == f"message {number}"
        assert sending.done()


async def send_all(ws: ClientConnection, messages: list[str]) -> None:
    for message in messages:
        await ws.send(message)


async def fragments_of(ws: ClientConnection | ServerConnection) -> list[str | bytes]:
    """Give a message's fragments, without an empty last one that only says the end."""
    found: list[str | bytes] = [one async for one in ws.recv_streaming()]
    return found[:-1] if len(found) > 1 and not found[-1] else found


FRAGMENTED: dict[str, list[str] | list[bytes]] = {
    "text": ["one ", "two ", "three"],
    "binary": [b"one", b"two", b"three"],
    "empty ones": [b"", b"x", b"", b"", b"y"],
    "a large one": [b"a", os.urandom(200_000), b"b"],
    "characters of several bytes": ["é", "漢", "😀" * 50],
    "many": [bytes([n % 256]) for n in range(1_000)],
}


@pytest.mark.parametrize("name", FRAGMENTED)
async def test_fragments_from_the_client_and_back(talk: Talk, name: str) -> None:
    fragments = FRAGMENTED[name]
    got: list[list[str | bytes]] = []

    async def keep(connection: ServerConnection) -> None:
        got.append(await fragments_of(connection))
        await connection.send(fragments)

    talk.handlers["/keep"] = keep
    async with asyncio.timeout(DEADLINE), talk.dial("/keep") as ws:
        await ws.send(fragments)
        assert await fragments_of(ws) == list(fragments)
    assert got == [list(fragments)]


async def test_a_character_split_between_two_fragments(talk: Talk) -> None:
    """RFC 6455 8.1: it is the whole message that has to be UTF-8."""
    async with asyncio.timeout(DEADLINE), talk.dial() as ws:
        half, other = "é".encode()[:1], "é".encode()[1:]
        ws.transport.write(frame(0x1, half, fin=False) + frame(0x0, other))
        assert await ws.recv() == "é"


# Control frames.


@pytest.mark.parametrize("payload", [b"", b"x", os.urandom(124), os.urandom(125)])
@pytest.mark.parametrize("way", ["client", "server"])
async def test_pings_are_matched_by_their_pongs(talk: Talk, payload: bytes, way: str) -> None:
    answered = asyncio.Event()

    async def ping(connection: ServerConnection) -> None:
        await (await connection.ping(payload))
        answered.set()

    talk.handlers["/ping"] = ping
    async with asyncio.timeout(DEADLINE):
        if way == "client":
            async with talk.dial() as ws:
                latencies = [await (await ws.ping(payload)) for _ in range(2)]
                assert all(latency >= 0 for latency in latencies)
        else:
            async with talk.dial("/ping"):
                await answered.wait()


async def test_several_pings_at_once(talk: Talk) -> None:
    """A pong answers its own ping and those before (RFC 6455 5.5.3)."""
    async with asyncio.timeout(DEADLINE), talk.dial() as ws:
        waiting = [await ws.ping(f"ping {number}") for number in range(100)]
        await asyncio.gather(*waiting)


async def test_control_frames_between_fragments(talk: Talk) -> None:
    """RFC 6455 5.4: pings and pongs may come in the middle of a message, both ways."""
    pongs: list[float] = []

    async def in_the_middle(connection: ServerConnection) -> None:
        async def fragments() -> AsyncIterator[bytes]:
            for number in range(5):
                yield bytes([number]) * 1_000
                pongs.append(await (await connection.ping(f"server {number}")))

        assert len(await fragments_of(connection)) == 5
        await connection.send(fragments())

    talk.handlers["/middle"] = in_the_middle
    async with asyncio.timeout(DEADLINE), talk.dial("/middle") as ws:

        async def fragments() -> AsyncIterator[bytes]:
            for number in range(5):
                yield bytes([number]) * 1_000
                pongs.append(await (await ws.ping(f"client {number}")))

        await ws.send(fragments())
        assert [one[:1] for one in await fragments_of(ws)] == [bytes([n]) for n in range(5)]
    assert len(pongs) == 10


async def test_an_unasked_pong_means_nothing(talk: Talk) -> None:
    async with asyncio.timeout(DEADLINE), talk.dial() as ws:
        await ws.pong(b"nobody asked")
        await ws.send("still here")
        assert await ws.recv() == "still here"


async def test_keepalive_pings_are_answered(tmp_path: Path) -> None:
    """The library's own, from both ends; each measures the way there and back by them."""
    often: dict[str, Any] = {"ping_interval": 0.02, "ping_timeout": DEADLINE}
    servers: list[ServerConnection] = []

    async def wait(connection: ServerConnection) -> None:
        servers.append(connection)
        await connection.wait_closed()

    async with talking(tmp_path, **often) as talk:
        talk.handlers["/wait"] = wait
        async with talk.dial("/wait", **often) as ws:
            await eventually(lambda: ws.latency > 0 and servers[0].latency > 0, DEADLINE)


# Closing.

CODES = [
    (1000, ""),
    (1000, "done"),
    (1001, "going away"),
    (1008, "policy"),
    (1011, "é漢😀"),
    (3000, "registered"),
    (4000, "own"),
    (4999, "x" * 123),
]


@pytest.mark.parametrize(("code", "reason"), CODES)
async def test_close_codes_from_the_client(talk: Talk, code: int, reason: str) -> None:
    async with talk.dial() as ws:
        await ws.close(code, reason)
        assert ws.close_code == code
    assert await talk.how_it_ended() == (code, reason)


@pytest.mark.parametrize(("code", "reason"), CODES)
async def test_close_codes_from_the_server(talk: Talk, code: int, reason: str) -> None:
    async def close(connection: ServerConnection) -> None:
        await connection.send("last words")
        await connection.close(code, reason)

    talk.handlers["/close"] = close
    async with asyncio.timeout(DEADLINE), talk.dial("/close") as ws:
        assert await ws.recv() == "last words"
        with pytest.raises(websockets.ConnectionClosed) as ended:
            await ws.recv()
        assert ended.value.rcvd is not None
        assert (ended.value.rcvd.code, ended.value.rcvd.reason) == (code, reason)
    assert await talk.how_it_ended() == (code, reason)


async def test_a_close_without_a_code(talk: Talk) -> None:
    """RFC 6455 7.1.5: then it is 1005 to whoever got it."""
    async with asyncio.timeout(DEADLINE), talk.dial() as ws:
        ws.transport.write(frame(0x8, b""))
        assert (await talk.how_it_ended())[0] == CloseCode.NO_STATUS_RCVD


async def test_both_close_at_once(talk: Talk) -> None:
    """RFC 6455 7.1.3 allows it, and both see a proper end."""
    go = asyncio.Event()

    async def close(connection: ServerConnection) -> None:
        await go.wait()
        await connection.close(4001, "server")

    talk.handlers["/both"] = close
    async with asyncio.timeout(DEADLINE), talk.dial("/both") as ws:
        go.set()
        await ws.close(4002, "client")
        assert ws.close_code in (4001, 4002)
    assert (await talk.how_it_ended())[0] in (4001, 4002)


async def test_what_was_sent_before_a_close_arrives_before_it(talk: Talk) -> None:
    got: list[str | bytes] = []

    async def take(connection: ServerConnection) -> None:
        while True:
            got.append(await connection.recv())

    talk.handlers["/take"] = take
    messages = [os.urandom(100_000) for _ in range(30)]
    async with asyncio.timeout(DEADLINE), talk.dial("/take") as ws:
        for message in messages:
            await ws.send(message)
    assert await talk.how_it_ended() == (1000, "")
    assert got == messages


# Losses without a closing handshake: 1006 at the other end.


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "in a message"])
async def test_a_client_that_is_lost(talk: Talk, busy: bool) -> None:
    async with talk.dial() as ws:
        if busy:
            ws.transport.write(frame(0x2, bytes(1_000), fin=False))
        ws.transport.abort()
        assert await talk.how_it_ended() == (CloseCode.ABNORMAL_CLOSURE, "")


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "in a message"])
async def test_a_server_that_is_lost(talk: Talk, busy: bool) -> None:
    async def leave(connection: ServerConnection) -> None:
        await connection.recv()
        if busy:
            connection.transport.write(frame(0x2, bytes(1_000), fin=False, mask=False))
        connection.transport.abort()

    talk.handlers["/leave"] = leave
    async with asyncio.timeout(DEADLINE), talk.dial("/leave") as ws:
        await ws.send("go")
        with pytest.raises(websockets.ConnectionClosedError) as ended:
            await ws.recv()
        assert ended.value.rcvd is None
        assert ws.close_code == CloseCode.ABNORMAL_CLOSURE


@pytest.mark.parametrize("which", ["a", "b", "gateway"])
async def test_a_part_of_the_way_that_is_lost(tmp_path: Path, which: str) -> None:
    """The calling sidecar, the called one, or the gateway: both ends see the loss."""
    async with talking(tmp_path) as talk, asyncio.timeout(DEADLINE), talk.dial() as ws:
        await ws.send("here")
        assert await ws.recv() == "here"
        if which == "gateway":
            talk.mesh.world.gateway.drop_connections()
        else:
            await talk.mesh.sidecars[which].stop()
        with pytest.raises(websockets.ConnectionClosedError) as ended:
            await ws.recv()
        assert ended.value.rcvd is None
        assert (await talk.how_it_ended())[0] == CloseCode.ABNORMAL_CLOSURE


# Errors of the protocol: the mesh passes them on, and the end that sees them says which it was.


def frame(
    opcode: int, payload: bytes, *, fin: bool = True, mask: bool = True, rsv: int = 0
) -> bytes:
    """Write a frame by hand, right or wrong (RFC 6455 5.2)."""
    head = bytes([fin << 7 | rsv << 4 | opcode])
    size, masked = len(payload), mask << 7
    if size < 126:
        head += bytes([masked | size])
    elif size < 65_536:
        head += struct.pack("!BH", masked | 126, size)
    else:
        head += struct.pack("!BQ", masked | 127, size)
    return head + (bytes(4) if mask else b"") + payload  # a mask of zeros changes nothing


WRONG: dict[str, tuple[Callable[[bool], bytes], int]] = {
    "text that is not UTF-8": (lambda mask: frame(0x1, b"\xff\xfe", mask=mask), 1007),
    "text cut in a character": (lambda mask: frame(0x1, b"\xc3", mask=mask), 1007),
    "a surrogate": (lambda mask: frame(0x1, b"\xed\xa0\x80", mask=mask), 1007),
    "not UTF-8 in a later fragment": (
        lambda mask: frame(0x1, b"good", fin=False, mask=mask) + frame(0x0, b"\xff", mask=mask),
        1007,
    ),
    "the other side's masking": (lambda mask: frame(0x1, b"hello", mask=not mask), 1002),
    "a reserved opcode": (lambda mask: frame(0x3, b"x", mask=mask), 1002),
    "a reserved control opcode": (lambda mask: frame(0xB, b"x", mask=mask), 1002),
    "a reserved bit": (lambda mask: frame(0x1, b"x", mask=mask, rsv=4), 1002),
    "another reserved bit": (lambda mask: frame(0x2, b"x", mask=mask, rsv=1), 1002),
    "a fragmented ping": (lambda mask: frame(0x9, b"x", fin=False, mask=mask), 1002),
    "a ping of 126 bytes": (lambda mask: frame(0x9, bytes(126), mask=mask), 1002),
    "a continuation of nothing": (lambda mask: frame(0x0, b"x", mask=mask), 1002),
    "a message in a message": (
        lambda mask: frame(0x1, b"x", fin=False, mask=mask) + frame(0x1, b"y", mask=mask),
        1002,
    ),
    "a close of one byte": (lambda mask: frame(0x8, b"\x03", mask=mask), 1002),
    "a close with a code that is none": (
        lambda mask: frame(0x8, struct.pack("!H", 999), mask=mask),
        1002,
    ),
    "a close with a code never sent": (
        lambda mask: frame(0x8, struct.pack("!H", 1006), mask=mask),
        1002,
    ),
    "a close whose reason is not UTF-8": (
        lambda mask: frame(0x8, struct.pack("!H", 1000) + b"\xff", mask=mask),
        1007,
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_clients_error_is_closed_by_the_server(talk: Talk, name: str) -> None:
    make, code = WRONG[name]
    async with asyncio.timeout(DEADLINE), talk.dial() as ws:
        ws.transport.write(make(True))
        with pytest.raises(websockets.ConnectionClosed) as ended:
            await ws.recv()
        assert ended.value.rcvd is not None
        assert ended.value.rcvd.code == code


@pytest.mark.parametrize("name", WRONG)
async def test_a_servers_error_is_closed_by_the_client(talk: Talk, name: str) -> None:
    make, code = WRONG[name]
    seen: asyncio.Queue[int | None] = asyncio.Queue()

    async def err(connection: ServerConnection) -> None:
        connection.transport.write(make(False))
        await connection.wait_closed()
        received = connection.protocol.close_rcvd
        seen.put_nowait(received.code if received is not None else None)

    talk.handlers["/err"] = err
    async with asyncio.timeout(DEADLINE), talk.dial("/err") as ws:
        with pytest.raises(websockets.ConnectionClosed) as ended:
            await ws.recv()
        assert ended.value.sent is not None
        assert ended.value.sent.code == code
        assert await seen.get() == code


async def test_a_message_over_the_receivers_limit(talk: Talk) -> None:
    """1009 from the client, whose limit it is."""

    async def too_much(connection: ServerConnection) -> None:
        await connection.send(bytes(2 * MIB))

    talk.handlers["/much"] = too_much
    async with asyncio.timeout(DEADLINE), talk.dial("/much", max_size=MIB) as ws:
        with pytest.raises(websockets.ConnectionClosedError) as ended:
            await ws.recv()
        assert ended.value.sent is not None
        assert ended.value.sent.code == CloseCode.MESSAGE_TOO_BIG
    assert (await talk.how_it_ended())[0] == CloseCode.MESSAGE_TOO_BIG


# The handshake.


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [
        (["chat.v1"], "chat.v1"),
        (["chat.v1", "chat.v2"], "chat.v2"),
        (["x", "chat.v1"], "chat.v1"),
    ],
)
async def test_a_subprotocol_is_agreed_on(talk: Talk, offered: list[str], agreed: str) -> None:
    subprotocols = [Subprotocol(one) for one in offered]
    async with talk.dial(subprotocols=subprotocols) as ws:
        assert ws.subprotocol == agreed
        assert talk.requests[0].headers["Sec-WebSocket-Protocol"] == ", ".join(offered)


async def test_no_subprotocol_in_common_is_refused_by_the_server(talk: Talk) -> None:
    with pytest.raises(websockets.InvalidStatus) as caught:
        await talk.dial(subprotocols=[Subprotocol("other")])
    assert caught.value.response.status_code == 400


async def test_the_handshake_as_the_server_sees_it(talk: Talk) -> None:
    """Who called is told; what routed it is not; all else is as it was sent."""
    extra = {"Authorization": "Bearer x", "X-Own": "é".encode().decode("latin-1"), "Cookie": "a=b"}
    async with talk.dial("/echo?x=1&y=%2F", additional_headers=extra, origin="http://o.test") as ws:
        assert ws.response is not None
        assert ws.response.headers["Connection"].lower() == "upgrade"
    request = talk.requests[0]
    assert request.path == "/echo?x=1&y=%2F"
    assert request.headers["x-dstack-app-id"] == talk.mesh.app_id("a")
    assert request.headers["x-forwarded-proto"] == "https"
    assert request.headers["Authorization"] == "Bearer x"
    assert request.headers["Cookie"] == "a=b"
    assert request.headers["Origin"] == "http://o.test"
    assert request.headers["Sec-WebSocket-Version"] == "13"
    assert "x-dstack-target-app" not in request.headers


async def test_a_forged_identity_does_not_arrive(talk: Talk) -> None:
    forged = {"x-dstack-app-id": "0" * 40, "X_Dstack_App_Id": "1" * 40, "X-Real-IP": "9.9.9.9"}
    async with talk.dial(additional_headers=forged):
        pass
    headers = talk.requests[0].headers
    assert headers.get_all("x-dstack-app-id") == [talk.mesh.app_id("a")]
    assert "X_Dstack_App_Id" not in headers
    assert headers.get_all("x-real-ip") != ["9.9.9.9"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 426, 500, 503])
async def test_a_handshake_that_the_server_refuses(talk: Talk, status: int) -> None:
    with pytest.raises(websockets.InvalidStatus) as caught:
        await talk.dial(f"/refuse/{status}")
    response = caught.value.response
    assert response.status_code == status
    assert response.body == f"no, {status}\n".encode()
    assert "x-dstack-mesh-error" not in response.headers
    assert (response.headers.get("WWW-Authenticate") is not None) is (status == 401)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_followed_by_the_client_not_by_the_mesh(
    talk: Talk, status: int
) -> None:
    async with asyncio.timeout(DEADLINE), talk.dial(f"/refuse/{status}") as ws:
        await ws.send("there")
        assert await ws.recv() == "there"
    assert [request.path for request in talk.requests] == ["/echo"]


@COMPRESSION
async def test_deflate_is_agreed_on_by_the_ends(talk: Talk, compression: str | None) -> None:
    """The mesh passes the offer and the answer; compressed frames stay compressed."""
    async with asyncio.timeout(DEADLINE), talk.dial(compression=compression) as ws:
        assert ws.response is not None
        answer = ws.response.headers.get("Sec-WebSocket-Extensions")
        assert (answer is not None) is (compression is not None)
        for message in ("a" * 100_000, os.urandom(100_000), "", "b" * 10):
            await ws.send(message)
            assert await ws.recv() == message


# Many, and slow ones.


async def test_50_at_once(talk: Talk) -> None:
    """None with another's messages, and all of them open at the same time."""
    everybody = asyncio.Barrier(50)

    async def speak(number: int) -> None:
        async with talk.dial(compression="deflate" if number % 2 else None) as ws:
            await everybody.wait()
            for turn in range(10):
                message = f"{number} {turn} " * (1 + number * 20)
                await ws.send(message)
                assert await ws.recv() == message

    async with asyncio.timeout(2 * DEADLINE):
        await asyncio.gather(*(speak(number) for number in range(50)))
    for _ in range(50):
        assert await talk.how_it_ended() == (1000, "")


async def test_a_client_that_reads_slowly_slows_the_server_down(talk: Talk) -> None:
    """64 MB wait where they come from, not in a sidecar: each holds 1 MiB a way at most."""
    sent = 0
    block = os.urandom(64 * 1024)
    total = 1024

    async def pour(connection: ServerConnection) -> None:
        nonlocal sent
        for _ in range(total):
            await connection.send(block)
            sent += 1

    talk.handlers["/pour"] = pour
    async with asyncio.timeout(2 * DEADLINE), talk.dial("/pour", max_queue=1) as ws:
        stalled = await stands_still(lambda: sent)
        assert stalled < total / 2, "it was taken by somebody"
        assert buffered(talk.mesh) < 8 * MIB
        for _ in range(total):
            assert await ws.recv() == block
    assert sent == total


async def test_a_server_that_reads_slowly_slows_the_client_down(talk: Talk) -> None:
    go = asyncio.Event()
    sent = got = 0
    block = os.urandom(64 * 1024)
    total = 1024

    async def drink(connection: ServerConnection) -> None:
        nonlocal got
        connection.transport.pause_reading()
        await go.wait()
        connection.transport.resume_reading()
        async for message in connection:
            assert message == block
            got += 1

    async def pour(ws: ClientConnection) -> None:
        nonlocal sent
        for _ in range(total):
            await ws.send(block)
            sent += 1

    talk.handlers["/drink"] = drink
    async with asyncio.timeout(2 * DEADLINE), talk.dial("/drink") as ws:
        pouring = asyncio.create_task(pour(ws))
        stalled = await stands_still(lambda: sent)
        assert stalled < total / 2, "it was taken by somebody"
        assert buffered(talk.mesh) < 8 * MIB
        go.set()
        await pouring
    assert await talk.how_it_ended() == (1000, "")
    assert got == total


async def stands_still(count: Callable[[], int]) -> int:
    """Wait until a number has stopped to grow; give it."""
    before, same = -1, 0
    while same < 20:
        await asyncio.sleep(0.02)
        now = count()
        same = same + 1 if now == before and now > 0 else 0
        before = now
    return before


def buffered(one: Mesh) -> int:
    """Count what the two sidecars hold, to be written, for all their connections."""
    held = 0
    for sidecar in one.sidecars.values():
        for service in (sidecar._outbound, sidecar._inbound):
            for client in service.connections:
                assert isinstance(client, Downstream)
                held += client.transport.get_write_buffer_size()
        for upstream in sidecar.worker.upstreams:
            assert isinstance(upstream, Upstream)
            held += upstream.transport.get_write_buffer_size()
    return held

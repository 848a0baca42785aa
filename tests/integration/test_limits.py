"""Every limit on what a peer controls, at it and one beyond it, through real sidecars both ways.

What has no setting is a constant of the contract, and the error says the number.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import h11
import pytest

from dstack_mesh.model import TcpAddress
from dstack_mesh.wire import limits
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    Origin,
    Wire,
    eventually,
    mesh,
    origin,
    problem,
    request,
)
from tests.integration.tls_peers import caller_context, new_app_id

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HEAD, FIELDS = limits.MAX_HEAD_BYTES, limits.MAX_FIELDS
TARGET, LINE = limits.MAX_REQUEST_TARGET_BYTES, limits.MAX_REQUEST_LINE_BYTES
CHUNK_LINE, DIGITS = limits.MAX_CHUNK_LINE_BYTES, limits.MAX_CHUNK_SIZE_DIGITS
INTERIM = limits.MAX_INTERIM_RESPONSES
LENGTH_DIGITS = 18
"""Of a Content-Length: below 2**63, for every reader."""

BOTH_WAYS = pytest.mark.parametrize("way", ["outbound", "inbound"])


# The stage.


@dataclass
class Stage:
    """One direction: a client of `listener`, and `origin` behind one sidecar."""

    mesh: Mesh
    listener: TcpAddress
    tls: ssl.SSLContext | None
    origin: Origin
    own: tuple[bytes, ...]
    """Field lines that each request has to have."""

    async def ask(self, data: bytes) -> Answer:
        async with Client.connect(self.listener, self.tls) as client:
            await client.send(data)
            return await client.answer()

    def connect(self) -> contextlib.AbstractAsyncContextManager[Client]:
        return Client.connect(self.listener, self.tls)

    def head(self, line: bytes = b"GET / HTTP/1.1", *fields: bytes) -> bytes:
        return b"\r\n".join((line, b"Host: a", *self.own, *fields, b"", b""))


class Origins:
    """Serves what the test says, to each whole request."""

    def __init__(self) -> None:
        self.response = OK
        self.silent = False

    async def __call__(self, wire: Wire) -> None:
        while True:
            head = (await wire.head()).lower()
            if b"transfer-encoding: chunked" in head:
                await wire.until(b"\r\n\r\n")
            elif b"content-length: " in head:
                await wire.until(b"ok")
            if self.silent:
                await wire.to_end()
                return
            await wire.send(self.response)


@contextlib.asynccontextmanager
async def stage(
    directory: Path, way: str, serve: Origins | None = None, **environ: str
) -> AsyncIterator[Stage]:
    """Run the one sidecar between a client and an origin, which is a backend or a target."""
    serve = serve or Origins()
    async with mesh(directory) as one:
        issued = one.world.kms.issue(new_app_id())
        if way == "inbound":
            async with origin(serve) as (backend, address):
                await one.start("b", MESH_BACKEND=str(address), **environ)
                context = caller_context(one.world.kms.root_pem, issued)
                yield Stage(one, one.inbound("b"), context, backend, ())
            return
        target = new_app_id()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        one.world.kms.issue(target).load_into(context)
        async with origin(serve, tls=context) as (backend, address):
            one.world.gateway.add_route(target, address.host, address.port)
            await one.start("a", backend=False, **environ)
            own = b"x-dstack-target-app: %b" % target.encode()
            yield Stage(one, one.outbound("a"), None, backend, (own,))


def filled(head: bytes, size: int) -> bytes:
    """Make a head just `size` bytes by a field of that length."""
    return head[:-2] + b"X: %b\r\n\r\n" % (b"a" * (size - len(head) - 5))


# Requests.


@BOTH_WAYS
async def test_head_bytes(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        answer = await one.ask(filled(one.head(), HEAD + 1))
        assert str(HEAD) in str(problem(answer, "header_too_large", 431)["detail"])
        assert one.origin.received == b""
        assert (await one.ask(filled(one.head(), HEAD))).status == 200


@BOTH_WAYS
async def test_field_lines(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        left = FIELDS - 1 - len(one.own)
        answer = await one.ask(one.head(b"GET / HTTP/1.1", *[b"X: a"] * (left + 1)))
        assert f"{FIELDS} " in str(problem(answer, "header_too_large", 431)["detail"])
        assert one.origin.received == b""
        assert (await one.ask(one.head(b"GET / HTTP/1.1", *[b"X: a"] * left))).status == 200
        assert one.origin.received.count(b"X: a\r\n") == left


@BOTH_WAYS
async def test_request_target(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        answer = await one.ask(one.head(b"GET /%b HTTP/1.1" % (b"a" * TARGET)))
        assert str(TARGET) in str(problem(answer, "uri_too_long", 414)["detail"])
        assert one.origin.received == b""
        longest = b"/" + b"a" * (TARGET - 1)
        assert (await one.ask(one.head(b"GET %b HTTP/1.1" % longest))).status == 200
        assert b"GET %b HTTP/1.1\r\n" % longest in one.origin.received


@BOTH_WAYS
async def test_request_line(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        rest = b" /%b HTTP/1.1" % (b"a" * (TARGET - 1))
        method = b"M" * (LINE - len(rest))
        answer = await one.ask(one.head(b"M" + method + rest))
        problem(answer, "uri_too_long", 414)
        assert one.origin.received == b""
        assert (await one.ask(one.head(method + rest))).status == 200


CHUNKED = b"Transfer-Encoding: chunked"


@BOTH_WAYS
async def test_chunk_lines(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        head = one.head(b"POST / HTTP/1.1", CHUNKED)
        for beyond in (1, 0):
            line = b"2;" + b"e" * (CHUNK_LINE - 2 + beyond)
            answer = await one.ask(head + line + b"\r\nok\r\n0\r\n\r\n")
            if beyond:
                problem(answer, "bad_request", 400)
            else:
                assert answer.status == 200
        # Without the line's end, too: that it is too long shows before.
        answer = await one.ask(head + b"2;" + b"e" * CHUNK_LINE)
        assert f"{CHUNK_LINE} bytes" in str(problem(answer, "bad_request", 400)["detail"])


@BOTH_WAYS
async def test_chunk_size_digits(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        head = one.head(b"POST / HTTP/1.1", CHUNKED)
        answer = await one.ask(head + b"2".zfill(DIGITS + 1) + b"\r\nok\r\n0\r\n\r\n")
        assert f"{DIGITS} digits" in str(problem(answer, "bad_request", 400)["detail"])
        answer = await one.ask(head + b"2".zfill(DIGITS) + b"\r\nok\r\n0\r\n\r\n")
        assert answer.status == 200


@BOTH_WAYS
async def test_content_length_digits(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        for beyond in (1, 0):
            length = b"Content-Length: %b" % b"2".zfill(LENGTH_DIGITS + beyond)
            answer = await one.ask(one.head(b"POST / HTTP/1.1", length) + b"ok")
            if beyond:
                told = problem(answer, "bad_request", 400)
                assert f"{LENGTH_DIGITS} digits" in str(told["detail"])
                assert one.origin.received == b""
            else:
                assert answer.status == 200


@BOTH_WAYS
async def test_trailers(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way) as one:
        body = one.head(b"POST / HTTP/1.1", CHUNKED) + b"2\r\nok\r\n0\r\n"
        most = b"X: %b\r\n\r\n" % (b"a" * (HEAD - 7))
        assert len(most) == HEAD
        for trailers, said in (
            (most.replace(b"X: a", b"X: aa"), f"{HEAD} bytes"),
            (b"X: a\r\n" * (FIELDS + 1) + b"\r\n", f"{FIELDS} "),
        ):
            answer = await one.ask(body + trailers)
            assert said in str(problem(answer, "bad_request", 400)["detail"])
        for trailers in (most, b"X: a\r\n" * FIELDS + b"\r\n"):
            assert (await one.ask(body + trailers)).status == 200


# Responses.


def response(*fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((b"HTTP/1.1 200 OK", *fields, b"", b"")) + body


_LENGTH = b"Content-Length: 2"
_EARLY = b"HTTP/1.1 103 Early Hints\r\n\r\n"
_TRAILERS = b"X: %b\r\n\r\n" % (b"a" * (HEAD - 7))

RESPONSES = {
    "head bytes": (
        filled(response(_LENGTH), HEAD) + b"ok",
        filled(response(_LENGTH), HEAD + 1) + b"ok",
        f"{HEAD} bytes",
    ),
    "field lines": (
        response(_LENGTH, *[b"X: a"] * (FIELDS - 1), body=b"ok"),
        response(_LENGTH, *[b"X: a"] * FIELDS, body=b"ok"),
        f"{FIELDS} ",
    ),
    "interim responses": (_EARLY * INTERIM + OK, _EARLY * (INTERIM + 1) + OK, f"{INTERIM} interim"),
    "interim head bytes": (
        filled(_EARLY, HEAD) + OK,
        filled(_EARLY, HEAD + 1) + OK,
        f"{HEAD} bytes",
    ),
    "length digits": (
        response(b"Content-Length: " + b"2".zfill(LENGTH_DIGITS), body=b"ok"),
        response(b"Content-Length: " + b"2".zfill(LENGTH_DIGITS + 1), body=b"ok"),
        f"{LENGTH_DIGITS} digits",
    ),
    "chunk line": (
        response(CHUNKED, body=b"2;" + b"e" * (CHUNK_LINE - 2) + b"\r\nok\r\n0\r\n\r\n"),
        response(CHUNKED, body=b"2;" + b"e" * (CHUNK_LINE - 1) + b"\r\nok\r\n0\r\n\r\n"),
        "chunk line",
    ),
    "chunk size digits": (
        response(CHUNKED, body=b"2".zfill(DIGITS) + b"\r\nok\r\n0\r\n\r\n"),
        response(CHUNKED, body=b"2".zfill(DIGITS + 1) + b"\r\nok\r\n0\r\n\r\n"),
        f"{DIGITS} digits",
    ),
    "trailers' bytes": (
        response(CHUNKED, body=b"2\r\nok\r\n0\r\n" + _TRAILERS),
        response(CHUNKED, body=b"2\r\nok\r\n0\r\nX" + _TRAILERS),
        None,
    ),
    "trailers' lines": (
        response(CHUNKED, body=b"2\r\nok\r\n0\r\n" + b"X: a\r\n" * FIELDS + b"\r\n"),
        response(CHUNKED, body=b"2\r\nok\r\n0\r\n" + b"X: a\r\n" * (FIELDS + 1) + b"\r\n"),
        f"{FIELDS} ",
    ),
}


@BOTH_WAYS
async def test_responses(tmp_path: Path, way: str) -> None:
    serve = Origins()
    async with stage(tmp_path, way, serve) as one:
        for name, (within, beyond, said) in RESPONSES.items():
            serve.response = within
            answer = await one.ask(one.head())
            assert (answer.status, answer.body) == (200, b"ok"), name
            serve.response = beyond
            try:
                answer = await one.ask(one.head())
            except (ConnectionError, h11.RemoteProtocolError):
                assert said is None, "cut: this one may come in pieces, and the response had begun"
                continue
            told = problem(answer, "upstream_protocol_error", 502)
            assert (said or f"{HEAD} bytes") in str(told["detail"]), name


# Times.

SHORT = 0.6
SLACK = 5.0
"""Seconds that a loaded machine may take longer."""


@BOTH_WAYS
async def test_the_time_for_a_head(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way, MESH_HEAD_TIMEOUT=str(SHORT)) as one:
        async with one.connect() as client:
            head = one.head()
            await client.send(head[:10])
            await asyncio.sleep(SHORT / 3)
            await client.send(head[10:])
            assert (await client.answer()).status == 200
        async with one.connect() as client:
            begin = time.monotonic()
            await client.send(one.head()[:-1])
            assert await client.closed() == b""
            assert SHORT - 0.05 < time.monotonic() - begin < SHORT + SLACK


async def test_the_time_for_a_handshake(tmp_path: Path) -> None:
    async with stage(tmp_path, "inbound", MESH_HEAD_TIMEOUT=str(SHORT)) as one:
        reader, writer = await asyncio.open_connection(one.listener.host, one.listener.port)
        await asyncio.sleep(SHORT / 3)
        assert one.tls is not None
        await writer.start_tls(one.tls, server_hostname="x")
        client = Client(reader, writer)
        await client.send(one.head())
        assert (await client.answer()).status == 200
        writer.close()
        begin = time.monotonic()
        async with Client.connect(one.listener) as silent:
            assert await silent.closed() == b""
        assert SHORT - 0.05 < time.monotonic() - begin < SHORT + SLACK


@BOTH_WAYS
async def test_the_time_without_a_request(tmp_path: Path, way: str) -> None:
    async with stage(tmp_path, way, MESH_IDLE_TIMEOUT=str(SHORT)) as one:
        async with one.connect() as client:
            for _ in range(4):  # longer than the limit in all
                await client.send(one.head())
                assert (await client.answer()).status == 200
                await asyncio.sleep(SHORT / 3)
            await client.send(one.head())
            assert (await client.answer()).status == 200
            begin = time.monotonic()
            assert await client.closed() == b""
            assert SHORT - 0.05 < time.monotonic() - begin < SHORT + SLACK
        async with one.connect() as client:
            begin = time.monotonic()
            assert await client.closed() == b"", "one that never asked for anything"
            assert time.monotonic() - begin < SHORT + SLACK


@pytest.mark.parametrize("way", ["outbound", "inbound"])
async def test_the_time_for_a_response(tmp_path: Path, way: str) -> None:
    serve = Origins()
    serve.silent = True
    async with stage(tmp_path, way, serve, MESH_RESPONSE_TIMEOUT=str(SHORT)) as one:
        begin = time.monotonic()
        told = problem(await one.ask(one.head()), "response_timeout", 504)
        assert "MESH_RESPONSE_TIMEOUT" in str(told["detail"])
        assert SHORT - 0.05 < time.monotonic() - begin < SHORT + SLACK


async def test_the_time_to_connect(tmp_path: Path) -> None:
    async def silent(wire: Wire) -> None:
        await wire.to_end()

    async with mesh(tmp_path) as one, origin(silent) as (_, address):
        target = new_app_id()
        one.world.gateway.add_route(target, address.host, address.port)
        await one.start("a", backend=False, MESH_CONNECT_TIMEOUT=str(SHORT))
        begin = time.monotonic()
        told = problem(await one.call("a", target), "connect_timeout", 504)
        assert "MESH_CONNECT_TIMEOUT" in str(told["detail"])
        assert SHORT - 0.05 < time.monotonic() - begin < SHORT + SLACK


# Numbers.


async def test_connections_outbound(tmp_path: Path) -> None:
    async with (
        stage(tmp_path, "outbound", MESH_MAX_CONNECTIONS="5") as one,
        contextlib.AsyncExitStack() as stack,
    ):
        held = [await stack.enter_async_context(one.connect()) for _ in range(5)]
        for client in held:
            await client.send(one.head())
            assert (await client.answer()).status == 200
        async with one.connect() as sixth:
            told = problem(await sixth.answer(), "overloaded", 503)
            assert "MESH_MAX_CONNECTIONS" in str(told["detail"])
        await held[0].send(one.head())
        assert (await held[0].answer()).status == 200


async def test_connections_inbound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        stage(tmp_path, "inbound", MESH_MAX_CONNECTIONS="5") as one,
        contextlib.AsyncExitStack() as stack,
    ):
        held = [await stack.enter_async_context(one.connect()) for _ in range(5)]
        for client in held:
            await client.send(one.head())
            assert (await client.answer()).status == 200
        async with Client.connect(one.listener) as sixth:
            assert await sixth.closed() == b"", "not one byte: it is closed before TLS"
        said = [each for each in caplog.records if each.getMessage() == "connections_at_limit"]
        assert [each.fields["setting"] for each in said] == [  # type: ignore[attr-defined]
            "MESH_MAX_CONNECTIONS"
        ]
        await held[0].send(one.head())
        assert (await held[0].answer()).status == 200


async def test_handshakes_in_progress(tmp_path: Path) -> None:
    async with (
        stage(tmp_path, "inbound", MESH_MAX_CONNECTIONS="6") as one,
        contextlib.AsyncExitStack() as stack,
    ):
        listener = one.mesh.sidecars["b"]._listener
        assert listener is not None
        silent = [await stack.enter_async_context(Client.connect(one.listener)) for _ in range(6)]
        await eventually(lambda: len(listener._handshakes) == 6)
        assert not any(client.reader.at_eof() for client in silent), "six are within it"
        assert (await one.ask(one.head())).status == 200
        assert await silent[0].closed() == b"", "the oldest gave way to the seventh"
        assert len(listener._handshakes) == 5


async def test_admin_connections(tmp_path: Path) -> None:
    async with (
        stage(tmp_path, "outbound") as one,
        contextlib.AsyncExitStack() as stack,
    ):
        where = one.mesh.admin("a")
        held = [await stack.enter_async_context(Client.connect(where)) for _ in range(256)]
        await held[-1].send(request("GET", "/livez"))
        assert (await held[-1].answer()).status == 200
        async with Client.connect(where) as more:
            problem(await more.answer(), "overloaded", 503)
        assert (await one.ask(one.head())).status == 200, "other listeners have their own"

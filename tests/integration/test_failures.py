"""Each part absent, slow, gone early or talking nonsense: the contract's error, and then on.

Every case sends a next request, which has to work again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import h11
import pytest

from dstack_mesh.model import TcpAddress
from dstack_mesh.sim.impostor import Impostor, ok_answer
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.messages import Answer as SimAnswer
from dstack_mesh.sim.messages import Raw, Request
from dstack_mesh.sim.odd import Kind, impostor_chain
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    Wire,
    answers,
    eventually,
    mesh,
    mesh_before,
    origin,
    problem,
    request,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SHORT = {"MESH_CONNECT_TIMEOUT": "300ms", "MESH_RESPONSE_TIMEOUT": "300ms"}
LATE = 5.0
"""Seconds by which an answer that is due after 300 ms must be there, on a busy machine too."""


def to_b(pair: Mesh) -> tuple[str, str]:
    return ("x-dstack-target-app", pair.app_id("b"))


def came(pair: Mesh) -> str:
    """Give the target of the latest request at b's backend."""
    requests = pair.backends["b"].requests
    return requests[-1].target if requests else ""


async def next_works(pair: Mesh, target: str | None = "b", path: str = "/") -> None:
    answer = await pair.call("a", target, path=path)
    assert answer.status == 200, answer


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Hold the block to 300 ms, not less and not much more."""
    began = time.monotonic()
    yield
    assert 0.25 < time.monotonic() - began < LATE


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Mesh]:
    """A pair of which `a` waits for 300 ms."""
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False, **SHORT)
        await one.start("b")
        yield one


def reroute(pair: Mesh, address: TcpAddress) -> Callable[[], None]:
    """Have the gateway send b's connections to `address`; the result undoes it."""
    gateway, app = pair.world.gateway, pair.app("b")
    gateway.remove_route(app.app_id)
    gateway.add_route(app.app_id, address.host, address.port)

    def undo() -> None:
        gateway.remove_route(app.app_id)
        gateway.add_route(app.app_id, app.host)

    return undo


async def test_an_error_names_the_request(pair: Mesh) -> None:
    """The caller's `x-request-id` where there is one, else one that is made."""
    await pair.backends["b"].aclose()
    answer = await pair.call("a", "b", headers=[("X-Request-Id", "abc-1")])
    assert problem(answer, "connect_failed", 502)["request_id"] == "abc-1"
    made = {problem(await pair.call("a", "b"), "connect_failed", 502)["request_id"]}
    made.add(problem(await pair.call("a", "b"), "connect_failed", 502)["request_id"])
    assert len(made) == 2


async def test_an_error_to_head_has_no_body(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("HEAD", "/", [("x-dstack-target-app", "0" * 40)]))
        answer = await client.answer("HEAD")
        assert (answer.status, answer.error, answer.body) == (502, "tls_failed", b"")
        assert int(answer.get(b"content-length") or 0) > 0
        await client.send(request("GET", "/", [to_b(pair)]))
        assert (await client.answer()).status == 200


async def test_an_error_does_not_cost_the_connection(pair: Mesh) -> None:
    """Nor do the requests that were pipelined behind it go lost."""
    unknown = request("GET", "/", [("x-dstack-target-app", "0" * 40)])
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(unknown + request("GET", "/", [to_b(pair)]) + unknown)
        problem(await client.answer(), "tls_failed", 502)
        assert (await client.answer()).body == b"hello\n"
        problem(await client.answer(), "tls_failed", 502)


async def test_an_error_in_the_middle_of_an_upload(pair: Mesh) -> None:
    """The client gets it although it is still sending, and its bytes are not taken for heads."""
    async with Client.connect(pair.outbound("a")) as client:
        fields = [("x-dstack-target-app", "0" * 40), ("Content-Length", "1000000")]
        await client.send(request("POST", "/", fields) + b"GET / HTTP/1.1\r\n\r\n" * 1000)
        answer = await client.answer("POST")
        problem(answer, "tls_failed", 502)
        assert answer.get(b"connection") == b"close"
        assert await client.closed() == b""
    await next_works(pair)


# The gateway.


async def test_gateway_absent(pair: Mesh) -> None:
    await pair.world.gateway.stop_accepting()
    fields = problem(await pair.call("a", "b"), "connect_failed", 502)
    assert str(pair.world.gateway.address) in str(fields["detail"])
    assert "refused" in str(fields["detail"]).lower()
    await pair.world.gateway.resume_accepting()
    await next_works(pair)


@contextlib.contextmanager
def full_backlog() -> Iterator[TcpAddress]:
    """Give an address on which a connection attempt gets no answer at all."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        where = listener.getsockname()
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(where)
        yield TcpAddress(*where)


async def test_gateway_that_does_not_accept(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        with full_backlog() as address:
            await one.start("a", backend=False, MESH_GATEWAY_CONNECT=str(address), **SHORT)
            with in_time():
                fields = problem(await one.call("a", "b"), "connect_timeout", 504)
            assert "TCP" in str(fields["detail"])
        await next_works(one, None, "/info")


async def test_gateway_that_says_nothing(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one, origin(lambda wire: wire.to_end()) as (silent, address):
        await one.start("a", backend=False, MESH_GATEWAY_CONNECT=str(address), **SHORT)
        for _ in range(5):
            with in_time():
                fields = problem(await one.call("a", "b"), "connect_timeout", 504)
            assert "TLS" in str(fields["detail"])
        # It was TLS that began, and it was given up.
        assert all(wire.received[:1] == b"\x16" for wire in silent.wires)
        await eventually(lambda: all(wire.ended for wire in silent.wires))
        await next_works(one, None, "/info")


async def close_at_once(wire: Wire) -> None:
    await wire.read()


async def reset_at_once(wire: Wire) -> None:
    await wire.read()
    wire.reset()


async def say_http(wire: Wire) -> None:
    await wire.read()
    await wire.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    await wire.to_end()


async def say_garbage(wire: Wire) -> None:
    await wire.read()
    await wire.send(bytes(range(256)))
    await wire.to_end()


async def half_a_record(wire: Wire) -> None:
    await wire.read()
    await wire.send(b"\x16\x03\x03\x01\x00abc")


async def handshake_alert(wire: Wire) -> None:
    await wire.read()
    await wire.send(b"\x15\x03\x03\x00\x02\x02\x28")
    await wire.to_end()


@pytest.mark.parametrize(
    ("serve", "hint"),
    [
        (close_at_once, True),
        (reset_at_once, True),
        (half_a_record, True),
        (say_http, False),
        (say_garbage, False),
        (handshake_alert, False),
    ],
)
async def test_no_tls_session(
    pair: Mesh, serve: Callable[[Wire], Awaitable[None]], hint: bool
) -> None:
    """Where it just ends, `detail` says that the gateway does so for an app it does not know."""
    async with origin(serve) as (_, address):
        undo = reroute(pair, address)
        fields = problem(await pair.call("a", "b", "POST", body=b"secret"), "tls_failed", 502)
        assert ("no such app" in str(fields["detail"])) == hint, fields["detail"]
        undo()
    await next_works(pair)


async def test_no_common_tls_version(pair: Mesh) -> None:
    chain = pair.world.kms.issue(pair.app_id("b"))
    with Impostor(chain, max_version=ssl.TLSVersion.TLSv1_2) as old:
        undo = reroute(pair, old.address)
        problem(await pair.call("a", "b"), "tls_failed", 502)
        undo()
    await next_works(pair)


async def test_unknown_app_and_an_instance_that_is_down(pair: Mesh) -> None:
    fields = problem(await pair.call("a", "0" * 40), "tls_failed", 502)
    assert "no such app" in str(fields["detail"])
    undo = reroute(pair, TcpAddress("127.0.0.1", 9))
    fields = problem(await pair.call("a", "b"), "tls_failed", 502)
    assert "none of its instances answers" in str(fields["detail"])
    undo()
    await next_works(pair)


async def test_gateway_that_cuts_a_pooled_connection(pair: Mesh) -> None:
    """As it does with one that was idle for too long: nobody notices."""
    await next_works(pair)
    pair.world.gateway.drop_connections()
    await next_works(pair)
    assert sum(pair.world.gateway.connections.values()) == 2


async def test_gateway_unknown_until_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstack_mesh.dstack.gateway.FIRST_RETRY", 0.05)
    async with mesh(tmp_path) as one:
        await one.start("b")
        one.world.gateway.info.failing = True
        await one.start_closed("a", MESH_OUTBOUND_LISTEN="127.0.0.1:0")
        await asyncio.wait_for(one.sidecars["a"].identity.wait_loaded(), 10)
        answer = await one.call("a", "b")
        problem(answer, "gateway_unknown", 503)
        assert answer.get(b"retry-after") == b"1"
        await next_works(one, None, "/info")
        one.world.gateway.info.failing = False
        await eventually(lambda: one.sidecars["a"].directory.current is not None)
        await next_works(one)


# The target.


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (Kind.OTHER_APP, "peer_app_id_mismatch"),
        (Kind.OTHER_KMS, "peer_untrusted"),
        (Kind.SELF_SIGNED, "peer_untrusted"),
        (Kind.APP_CA_OF_OTHER_APP, "peer_untrusted"),
    ],
)
async def test_a_target_that_is_not_who_it_should_be(pair: Mesh, kind: Kind, code: str) -> None:
    b, a = pair.app_id("b"), pair.app_id("a")
    with Impostor(impostor_chain(pair.world.kms, kind, b, a), answer=ok_answer) as impostor:
        undo = reroute(pair, impostor.address)
        fields = problem(await pair.call("a", "b", "POST", body=b"secret"), code, 502)
        assert b in str(fields["detail"])
        await asyncio.to_thread(impostor.wait, lambda: impostor.connections == 1)
        assert impostor.application_bytes == 0
        undo()
    await next_works(pair)


async def test_a_target_that_refuses_our_certificate(pair: Mesh) -> None:
    stranger = Kms.create()
    chain = pair.world.kms.issue(pair.app_id("b"))
    with Impostor(chain, client_ca_pem=stranger.root_pem, answer=ok_answer) as strict:
        undo = reroute(pair, strict.address)
        for method in ("GET", "POST"):
            body = b"body" if method == "POST" else b""
            answer = await pair.call("a", "b", method, body=body)
            fields = problem(answer, "peer_rejected_us", 502)
            assert "refused" in str(fields["detail"])
        undo()
    await next_works(pair)


async def test_a_caller_that_is_not_let_in(tmp_path: Path) -> None:
    """The target's own mesh answers, and what it says arrives as its."""
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False)
        await one.start("b", MESH_ALLOWED_APPS="self")
        answer = await one.call("a", "b", "POST", body=b"x" * 100_000)
        assert answer.error == "policy_denied; remote"
        fields = problem(answer, "policy_denied", 403)
        assert one.app_id("a") in str(fields["detail"])
        assert not one.backends["b"].connections
        assert (await one.call("b", "b")).status == 200


async def inbound_call(pair: Mesh, chain: object | None) -> Answer:
    """Call b's mesh directly over TLS, with a certificate or without one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if chain is not None:
        chain.load_into(context)  # type: ignore[attr-defined]
    where = pair.inbound("b")
    reader, writer = await asyncio.open_connection(where.host, where.port, ssl=context)
    client = Client(reader, writer)
    try:
        await client.send(request("GET", "/", [("X-Request-Id", "direct")]))
        return await client.answer()
    finally:
        writer.transport.abort()


async def test_callers_without_a_good_certificate(pair: Mesh) -> None:
    fields = problem(await inbound_call(pair, None), "client_cert_required", 401)
    assert fields["request_id"] == "direct"
    b, a = pair.app_id("b"), pair.app_id("a")
    odd = impostor_chain(pair.world.kms, Kind.APP_CA_OF_OTHER_APP, a, b)
    problem(await inbound_call(pair, odd), "client_cert_untrusted", 401)
    assert not pair.backends["b"].connections
    good = pair.world.kms.issue(a)
    assert (await inbound_call(pair, good)).status == 200


# The backend.


async def test_backend_absent(pair: Mesh) -> None:
    await pair.backends["b"].aclose()
    answer = await pair.call("a", "b")
    assert answer.error == "connect_failed; remote"
    assert "backend" in str(problem(answer, "connect_failed", 502)["detail"])
    backend_listen = pair.sidecars["b"].settings.inbound.backend
    await pair.backends["b"].start(backend_listen)
    await next_works(pair)


async def test_backend_that_does_not_accept(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        await one.start("a")
        with full_backlog() as address:
            await one.start("b", backend=True, MESH_BACKEND=str(address), **SHORT)
            with in_time():
                problem(await one.call("a", "b"), "connect_timeout", 504)
        assert (await one.call("a", "a")).status == 200


async def test_slow_backend(impatient: Mesh) -> None:
    with in_time():
        answer = await impatient.call("a", "b", path="/slow?seconds=30")
    problem(answer, "response_timeout", 504)
    assert answer.error == "response_timeout"
    await next_works(impatient)


async def test_the_time_begins_with_the_end_of_the_request(impatient: Mesh) -> None:
    """An upload that takes longer is no reason to give up, nor is an event stream."""
    async with Client.connect(impatient.outbound("a")) as client:
        await client.send(request("POST", "/upload", [to_b(impatient), ("Content-Length", "7")]))
        for _ in range(7):
            await asyncio.sleep(0.06)
            await client.send(b"x")
        assert json.loads((await client.answer("POST")).body)["bytes"] == 7
        await client.send(request("GET", "/events?n=3&seconds=0.2", [to_b(impatient)]))
        assert (await client.answer()).body.count(b"data:") == 3


async def test_slow_backend_after_an_interim_response(tmp_path: Path) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    async with mesh_before(tmp_path, answers(interim), **SHORT) as (pair, _):
        with in_time():
            answer = await pair.call("a", "b")
        assert answer.interim == [103]
        problem(answer, "response_timeout", 504)


NONSENSE = {
    "not HTTP": b"hello\r\n\r\n",
    "no version": b"200 OK\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "h2 frames": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18),
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status of 0": b"HTTP/1.1 000 OK\r\n\r\n",
    "a bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "a folded field": b"HTTP/1.1 200 OK\r\nA: 1\r\n 2\r\nContent-Length: 2\r\n\r\nok",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok",
    "a NUL": b"HTTP/1.1 200 OK\r\nA: \0\r\nContent-Length: 2\r\n\r\nok",
    "both lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nokk",
    "an unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a 204 with a body": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
    "a switch unasked": b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
    "17 interim responses": b"HTTP/1.1 100 Continue\r\n\r\n" * 17 + OK,
    "a bad first chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a head of over 64 KiB": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
    "129 fields": b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * 129 + b"\r\n",
}


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_backend_that_talks_nonsense(pair: Mesh, method: str) -> None:
    backend = pair.backends["b"]
    for name, data in NONSENSE.items():
        backend.nonsense = data
        body = b"body" if method == "POST" else b""
        try:
            answer = await pair.call("a", "b", method, body=body)
            problem(answer, "upstream_protocol_error", 502)
            assert answer.error.endswith("; remote")
            backend.nonsense = None
            await next_works(pair)
        except Exception as error:
            error.add_note(name)
            raise


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 102 P\r\n\r\n"])
async def test_backend_that_closes_before_it_answers(
    tmp_path: Path, method: str, reset: bool, said: bytes
) -> None:
    async def serve(wire: Wire) -> None:
        if (await wire.head()).startswith(b"%b /x " % method.encode()):
            await wire.send(said)
            if reset:
                if said:
                    await asyncio.sleep(0.05)  # or the reset takes back what was said
                wire.reset()
            return
        await wire.send(OK)
        await wire.to_end()

    async with mesh_before(tmp_path, serve) as (pair, backend):
        body = b"body" if method == "POST" else b""
        answer = await pair.call("a", "b", method, "/x", body=body)
        problem(answer, "upstream_closed", 502)
        await next_works(pair)
        # It was a fresh connection, so even a GET was sent but once.
        assert backend.received.count(b" /x ") == 1


# A response that breaks off.


CUT = {
    "with a length": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500,
    "in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nxxxx",
    "between chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nxxxx\r\n",
    "before the trailers end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4\r\nxxxx\r\n0\r\nA: 1\r\n",
}


async def cut_response(pair: Mesh, version: str, data: bytes) -> tuple[bytes, bool]:
    """Have the backend send `data` and go; give what a client got, and whether it was reset."""

    async def raw(_: Request) -> SimAnswer:
        return Raw(data)

    pair.backends["b"].on("/cut-it", raw)
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/cut-it", [to_b(pair)], version=version))
        got = b""
        try:
            async with asyncio.timeout(10):
                while piece := await client.reader.read(65536):
                    got += piece
        except ConnectionResetError:
            return got, True
        return got, False


@pytest.mark.parametrize("name", CUT)
async def test_a_response_that_breaks_off_is_seen_as_such(pair: Mesh, name: str) -> None:
    """By an HTTP/1.1 client from the framing, by an HTTP/1.0 client from the reset."""
    got, was_reset = await cut_response(pair, "1.1", CUT[name])
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(got)
    if got:
        assert isinstance(parser.next_event(), h11.Response)
        while isinstance(event := parser.next_event(), h11.Data):
            pass
        assert event is h11.NEED_DATA
    assert was_reset
    _, was_reset = await cut_response(pair, "1.0", CUT[name])
    assert was_reset
    await next_works(pair)


async def test_a_response_that_turns_to_nonsense(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def serve(wire: Wire) -> None:
        await wire.head()
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n")
        await go.wait()
        await wire.send(b"xyz\r\n")
        await wire.to_end()

    async with mesh_before(tmp_path, serve) as (pair, backend):
        for version in ("1.1", "1.0"):
            go.clear()
            async with Client.connect(pair.outbound("a")) as client:
                await client.send(request("GET", "/", [to_b(pair)], version=version))
                await client.until(b"part")
                go.set()
                with pytest.raises(ConnectionResetError):
                    await client.reader.read(65536)
            # The rest of what the backend would say is of no interest.
            await eventually(lambda: backend.wires[-1].ended)


async def test_a_close_delimited_response_that_is_reset(tmp_path: Path) -> None:
    """Only an orderly end is one."""

    async def serve(wire: Wire) -> None:
        head = await wire.head()
        await wire.send(b"HTTP/1.0 200 OK\r\n\r\npart")
        if b"/reset" in head:
            await go.wait()
            wire.reset()

    go = asyncio.Event()
    async with mesh_before(tmp_path, serve) as (pair, _):
        assert (await pair.call("a", "b", path="/whole")).body == b"part"
        for version in ("1.1", "1.0"):
            go.clear()
            async with Client.connect(pair.outbound("a")) as client:
                await client.send(request("GET", "/reset", [to_b(pair)], version=version))
                assert not (await client.until(b"part")).endswith(b"0\r\n\r\n")
                go.set()
                with pytest.raises(ConnectionResetError):
                    await client.reader.read(65536)


async def test_a_target_whose_connection_ends_without_close_notify(tmp_path: Path) -> None:
    """A close-delimited response over TLS is then broken off, since anyone could have cut it."""
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False)
        chain = one.world.kms.issue(one.app_id("b"))

        def answer(received: bytes) -> bytes | None:
            return b"HTTP/1.1 200 OK\r\n\r\npart" if received.endswith(b"\r\n\r\n") else None

        with Impostor(chain, answer=answer) as target:
            reroute(one, target.address)
            async with Client.connect(one.outbound("a")) as client:
                await client.send(request("GET", "/", [to_b(one)]))
                assert not (await client.until(b"part")).endswith(b"0\r\n\r\n")
                one.world.gateway.drop_connections()
                with pytest.raises(ConnectionResetError):
                    await client.reader.read(65536)


# Retries.


class Once:
    """Answers a connection's first request, and hangs up on the second without a word."""

    def __init__(self) -> None:
        self.ran: list[bytes] = []

    async def __call__(self, wire: Wire) -> None:
        self.ran.append((await wire.head()).partition(b"\r\n")[0])
        await wire.send(OK)
        self.ran.append((await wire.head()).partition(b"\r\n")[0])


@pytest.mark.parametrize(
    ("method", "body", "retried"),
    [
        ("GET", b"", True),
        ("HEAD", b"", True),
        ("OPTIONS", b"", True),
        ("PUT", b"", True),
        ("DELETE", b"", True),
        ("POST", b"", False),
        ("PATCH", b"", False),
        ("QUERY-NOT-KNOWN", b"", False),
        ("GET", b"body", False),
        ("PUT", b"body", False),
    ],
)
async def test_a_pooled_connection_that_dies(
    tmp_path: Path, method: str, body: bytes, retried: bool
) -> None:
    """What may be sent again is, once and on a fresh connection; nothing else is."""
    serve = Once()
    async with mesh_before(tmp_path, serve) as (pair, backend):
        await next_works(pair)
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(request(method, "/again", [to_b(pair)], body))
            answer = await client.answer(method)
        first, *others = serve.ran
        assert first.startswith(b"GET / ")
        assert others == [f"{method} /again HTTP/1.1".encode()] * (2 if retried else 1)
        if retried:
            assert answer.status == 200
            assert len(backend.wires) == 2
        else:
            assert answer.error == "upstream_closed; remote"
            assert answer.status == 502
            await next_works(pair)


async def test_a_retry_is_not_retried(tmp_path: Path) -> None:
    count = 0

    async def serve(wire: Wire) -> None:
        nonlocal count
        head = await wire.head()
        if head.startswith(b"GET / "):
            await wire.send(OK)
            head = await wire.head()
        count += 1  # every other one, and on every connection

    async with mesh_before(tmp_path, serve) as (pair, _):
        await next_works(pair)
        problem(await pair.call("a", "b", path="/again"), "upstream_closed", 502)
        assert count == 2
        await next_works(pair)


async def test_no_retry_once_a_byte_has_come(tmp_path: Path) -> None:
    count = 0

    async def serve(wire: Wire) -> None:
        nonlocal count
        while True:
            if (await wire.head()).startswith(b"GET / "):
                await wire.send(OK)
                continue
            count += 1
            await wire.send(b"H")
            return

    async with mesh_before(tmp_path, serve) as (pair, _):
        await next_works(pair)
        problem(await pair.call("a", "b", path="/again"), "upstream_closed", 502)
        assert count == 1
        await next_works(pair)


async def test_a_pooled_tls_connection_that_dies(tmp_path: Path) -> None:
    """The same towards the target, whose identity is checked anew on the fresh connection."""
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False)
        seen: list[bytes] = []
        doomed = [b"GET /again HTTP/1.1", b"POST / HTTP/1.1"]

        def answer(received: bytes) -> bytes | None:
            seen.append(received.partition(b"\r\n")[0])
            if seen[-1] not in doomed:
                return OK
            doomed.remove(seen[-1])
            target.drop_connections()
            return None

        with Impostor(one.world.kms.issue(one.app_id("b")), answer=answer) as target:
            reroute(one, target.address)
            await next_works(one)
            await next_works(one, path="/again")
            assert target.handshakes == 2
            problem(await one.call("a", "b", "POST", body=b"body"), "upstream_closed", 502)
            await next_works(one)
    get, again, post = b"GET / HTTP/1.1", b"GET /again HTTP/1.1", b"POST / HTTP/1.1"
    assert seen == [get, again, again, post, get]


# The agent.


async def test_agent_absent_at_the_start(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        agent = one.app("a").agent
        await agent.aclose()
        await one.start_closed("a", MESH_OUTBOUND_LISTEN="127.0.0.1:0")
        await one.start("b")
        answer = await one.call("a", "b")
        problem(answer, "identity_unavailable", 503)
        assert answer.get(b"retry-after") == b"1"
        problem(await one.call("a", None, path="/info"), "agent_unavailable", 502)
        assert (await one.call("a", None, path="/health")).status == 200
        address = one.sidecars["a"].settings.dstack.agent
        await agent.start(address)
        await next_works(one, None, "/info")
        await asyncio.wait_for(one.sidecars["a"].identity.wait_loaded(), 10)
        await eventually(lambda: one.sidecars["a"].directory.current is not None)
        await next_works(one)


async def test_agent_that_goes_away_and_comes_back(pair: Mesh) -> None:
    """Targets are called with the identity that is there."""
    agent = pair.app("a").agent
    await next_works(pair, None, "/info")
    await agent.aclose()
    fields = problem(await pair.call("a", None, path="/info"), "agent_unavailable", 502)
    assert "dstack.sock" in str(fields["detail"])
    await next_works(pair)
    await agent.start(pair.sidecars["a"].settings.dstack.agent)
    await next_works(pair, None, "/info")


async def test_slow_agent(impatient: Mesh) -> None:
    agent = impatient.app("a").agent
    agent.delay = 30
    with in_time():
        problem(await impatient.call("a", None, path="/info"), "response_timeout", 504)
    agent.delay = 0
    await next_works(impatient, None, "/info")


async def test_agent_that_talks_nonsense_or_hangs_up(pair: Mesh) -> None:
    agent = pair.app("a").agent
    agent.nonsense = b"\x00\x01nonsense\r\n\r\n"
    problem(await pair.call("a", None, path="/info"), "upstream_protocol_error", 502)
    agent.nonsense = b""
    problem(await pair.call("a", None, path="/info"), "agent_unavailable", 502)
    agent.nonsense = None
    await next_works(pair, None, "/info")


# Limits.


async def test_overloaded(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False, MESH_MAX_CONNECTIONS="2")
        await one.start("b")
        where = one.outbound("a")
        async with Client.connect(where) as first, Client.connect(where):
            await first.send(request("GET", "/health"))
            assert (await first.answer()).status == 200
            async with Client.connect(where) as third:
                answer = await third.answer()
                problem(answer, "overloaded", 503)
                assert answer.get(b"retry-after") == b"1"
                assert await third.closed() == b""
            await first.send(request("GET", "/", [to_b(one)]))
            assert (await first.answer()).status == 200
        await eventually(lambda: not one.sidecars["a"]._outbound.connections)
        await next_works(one)


async def test_overloaded_inbound_closes_before_tls(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False)
        await one.start("b", MESH_MAX_CONNECTIONS="1")
        await next_works(one)
        where = one.inbound("b")
        reader, writer = await asyncio.open_connection(where.host, where.port)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await next_works(one)


async def test_clients_that_go_away_leave_nothing_behind(pair: Mesh) -> None:
    """While connecting, while waiting, and in the middle of a response.

    With a reset: a mere FIN could be from a client that still waits for its answer.
    """
    for path in ("/", "/slow?seconds=30", "/events?n=1000&seconds=0.05"):
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(request("GET", path, [to_b(pair)]))
            if path != "/":
                await eventually(lambda p=path: came(pair) == p)  # type: ignore[misc]
            if "events" in path:
                await client.until(b"event 1")
            client.reset()
    for name in ("a", "b"):
        sidecar = pair.sidecars[name]
        await eventually(lambda s=sidecar: not s._outbound.connections)  # type: ignore[misc]
        await eventually(
            lambda s=sidecar: all(  # type: ignore[misc]
                one.exchange is None for one in s.worker.upstreams
            )
        )
    await next_works(pair)

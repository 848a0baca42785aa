"""What the application sent is what the backend gets, and the answer comes back as it was."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.sim.messages import Answer as SimAnswer
from dstack_mesh.sim.messages import Raw, Request, Response
from tests.integration.harness import (
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

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

OF_THE_MESH = {
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-real-ip",
    "x-dstack-app-id",
}
"""Fields that the target's mesh adds."""


def to_b(pair: Mesh) -> tuple[str, str]:
    return ("x-dstack-target-app", pair.app_id("b"))


def answering(pair: Mesh, data: bytes) -> None:
    """Have b's backend answer `/raw` with these bytes, and close."""

    async def raw(_: Request) -> SimAnswer:
        return Raw(data)

    pair.backends["b"].on("/raw", raw)


def came(pair: Mesh) -> Request:
    """Give the latest request that reached b's backend."""
    return pair.backends["b"].requests[-1]


# Requests.


@pytest.mark.parametrize(
    "method",
    ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "M-SEARCH", "x!~"],
)
async def test_every_method_goes_through(pair: Mesh, method: str) -> None:
    answer = await pair.call("a", "b", method, "/echo")
    assert answer.status == 200
    assert json.loads(answer.body)["method"] == method


async def test_head_has_the_length_of_the_body_that_it_does_not_have(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        for path, length in (("/download?bytes=12345", b"12345"), ("/", b"6")):
            await client.send(request("HEAD", path, [to_b(pair)]))
            answer = await client.answer("HEAD")
            assert (answer.status, answer.get(b"content-length"), answer.body) == (
                200,
                length,
                b"",
            )
        await client.send(request("HEAD", "/download-chunked?bytes=10", [to_b(pair)]))
        answer = await client.answer("HEAD")
        assert answer.get(b"transfer-encoding") == b"chunked"
        await client.send(request("GET", "/", [to_b(pair)]))
        assert (await client.answer()).body == b"hello\n"


@pytest.mark.parametrize(
    "target",
    [
        "/a/../b",
        "//x",
        "/./",
        "/a%2Fb%2fc%41%7e",
        "/x?a=b?c&d=%00#".rstrip("#"),
        "/?",
        "/;p=1,2'()*!$&+@:|^`{}<>\"[]\\~",
        "/" + "x" * 16_000,
    ],
)
async def test_path_and_query_are_not_touched(pair: Mesh, target: str) -> None:
    await pair.call("a", "b", path=target)
    assert came(pair).target == target


async def test_options_asterisk(pair: Mesh) -> None:
    await pair.call("a", "b", "OPTIONS", "*")
    assert (came(pair).method, came(pair).target) == ("OPTIONS", "*")


@pytest.mark.parametrize(
    ("method", "target", "path", "host"),
    [
        ("GET", "http://other.test:81/a/../b?c=d", "/a/../b?c=d", "other.test:81"),
        ("GET", "http://other.test", "/", "other.test"),
        ("GET", "https://other.test?q", "/?q", "other.test"),
        ("OPTIONS", "http://other.test", "*", "other.test"),
    ],
)
async def test_absolute_form(pair: Mesh, method: str, target: str, path: str, host: str) -> None:
    """RFC 9112 3.2.2: the authority takes the place of `Host`."""
    await pair.call("a", "b", method, target)
    assert (came(pair).target, came(pair).header("host")) == (path, host)


@pytest.mark.parametrize("host", ["vpc-server", "VPC-Server:8080", "[::1]:80", ""])
async def test_host_is_as_it_came(pair: Mesh, host: str) -> None:
    await pair.call("a", "b", headers=[("hOsT", host)])
    assert [pair for pair in came(pair).headers if pair[0].lower() == "host"] == [("hOsT", host)]


async def test_headers_keep_order_spelling_and_bytes(pair: Mesh) -> None:
    fields = [
        ("Host", "h"),
        ("X-B", "2"),
        ("x-a", "1"),
        ("X-b", "3"),
        ("Cookie", "a=1"),
        ("COOKIE", "b=2"),
        ("X-Text", "caf\xe9 \x80\xff"),
        ("X-Empty", ""),
        ("X-Tab", "a\tb"),
        ("Authorization", "Bearer token"),
        ("x-under_score", "kept"),
        ("Accept-Encoding", "gzip"),
        ("User-Agent", "test"),
        ("X-Request-Id", "r-1"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ]
    await pair.call("a", "b", "POST", headers=[*fields, ("Content-Length", "0")])
    seen = [field for field in came(pair).headers if field[0].lower() not in OF_THE_MESH]
    assert seen == [*fields, ("Content-Length", "0")]


async def test_white_space_around_a_value_is_not_part_of_it(pair: Mesh) -> None:
    await pair.call("a", "b", headers=[("X-A", " \t a b \t ")])
    assert came(pair).header("x-a") == "a b"


async def test_hop_by_hop_fields_end_here(pair: Mesh) -> None:
    """RFC 9110 7.6.1: what `Connection` lists, and what proxies are known to have to drop."""
    fields = [
        ("Connection", "X-Listed"),
        ("X-Listed", "1"),
        ("connection", "x-other"),
        ("X-OTHER", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Connection", "keep-alive"),
        ("TE", "gzip;q=0.5"),
        ("X-Stays", "1"),
    ]
    answer = await pair.call("a", "b", headers=fields)
    assert answer.status == 200
    names = {name.lower() for name, _ in came(pair).headers}
    assert names == {"host", "x-stays"} | OF_THE_MESH


async def test_te_trailers_goes_on(pair: Mesh) -> None:
    await pair.call("a", "b", headers=[("TE", "gzip, trailers"), ("Connection", "TE")])
    assert came(pair).header("te") == "trailers"
    assert came(pair).header("connection") == "TE"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_any_method_may_have_a_body(pair: Mesh, method: str, chunked: bool) -> None:
    body = b"12345" * 1000
    if chunked:
        fields = [("Transfer-Encoding", "chunked")]
        data = b"".join(b"%x\r\n%b\r\n" % (1000, body[i : i + 1000]) for i in range(0, 5000, 1000))
        answer = await pair.call("a", "b", method, "/echo", fields, data + b"0\r\n\r\n")
    else:
        answer = await pair.call("a", "b", method, "/echo", body=body)
    seen = json.loads(answer.body)
    assert seen["method"] == method
    assert (seen["body_bytes"], seen["body_sha256"]) == (5000, hashlib.sha256(body).hexdigest())


async def test_an_absent_body_is_not_an_empty_one(pair: Mesh) -> None:
    """A length of 0 that was there stays, and none is made up."""
    await pair.call("a", "b", "POST", headers=[("Content-Length", "0")])
    assert came(pair).header("content-length") == "0"
    await pair.call("a", "b", "POST")
    assert came(pair).header("content-length") is None
    assert came(pair).header("transfer-encoding") is None


async def test_chunked_both_ways_with_trailers(pair: Mesh) -> None:
    body = b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 11\r\nX-Text: caf\xe9\r\n\r\n"
    fields = [("Transfer-Encoding", "chunked"), ("Trailer", "X-Sum"), ("TE", "trailers")]
    answer = await pair.call("a", "b", "POST", "/upload", fields, body)
    assert json.loads(answer.body) == {
        "bytes": 11,
        "sha256": hashlib.sha256(b"hello world").hexdigest(),
        "trailers": [["X-Sum", "11"], ["X-Text", "caf\xe9"]],
    }
    answer = await pair.call("a", "b", path="/download-chunked?bytes=300000", headers=fields[2:])
    digest = hashlib.sha256(answer.body).hexdigest().encode()
    assert (len(answer.body), answer.trailers) == (300_000, [(b"x-sha256", digest)])
    assert answer.get(b"trailer") == b"x-sha256"


async def test_trailers_cannot_pass_for_headers(pair: Mesh) -> None:
    body = (
        b"1\r\nx\r\n0\r\nContent-Length: 5\r\nHost: evil\r\nx_dstack_app-id: 00\r\n"
        b"X-Real-Ip: 1.2.3.4\r\nX-Dstack-Target-App: 00\r\nAuthorization: no\r\nX-Fine: 1\r\n\r\n"
    )
    fields = [("Transfer-Encoding", "chunked")]
    answer = await pair.call("a", "b", "POST", "/upload", fields, body)
    assert json.loads(answer.body)["trailers"] == [["X-Fine", "1"]]


# Responses.


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        (b"HTTP/1.1 200 Fine, thank you", 200, b"Fine, thank you"),
        (b"HTTP/1.1 200 ", 200, b""),
        (b"HTTP/1.1 200", 200, b""),
        (b"HTTP/1.1 299 caf\xe9", 299, b"caf\xe9"),
        (b"HTTP/1.1 307 Temporary Redirect", 307, b"Temporary Redirect"),
        (b"HTTP/1.1 401 Unauthorized", 401, b"Unauthorized"),
        (b"HTTP/1.1 500 Oh", 500, b"Oh"),
        (b"HTTP/1.1 599 Odd", 599, b"Odd"),
        (b"HTTP/1.1 799 Odder", 799, b"Odder"),
    ],
)
async def test_status_and_reason_are_as_they_came(
    pair: Mesh, line: bytes, status: int, reason: bytes
) -> None:
    answering(pair, line + b"\r\ncontent-length: 3\r\n\r\nabc")
    answer = await pair.call("a", "b", path="/raw")
    assert (answer.status, answer.reason, answer.body) == (status, reason, b"abc")
    assert answer.error == ""


async def test_responses_without_a_body_keep_the_connection(pair: Mesh) -> None:
    async def not_modified(_: Request) -> SimAnswer:
        return Response(304, [("content-length", "999"), ("etag", '"x"')])

    async def reset_content(_: Request) -> SimAnswer:
        return Response(205, [("content-length", "0")])

    pair.backends["b"].on("/304", not_modified)
    pair.backends["b"].on("/205", reset_content)
    async with Client.connect(pair.outbound("a")) as client:
        for _ in range(2):
            for path, status in (("/status/204", 204), ("/304", 304), ("/205", 205)):
                await client.send(request("GET", path, [to_b(pair)]))
                answer = await client.answer()
                assert (answer.status, answer.body) == (status, b"")
                if status == 304:
                    assert answer.get(b"content-length") == b"999"
                    assert answer.get(b"etag") == b'"x"'
    assert pair.backends["b"].connections == 1


async def test_response_headers_keep_order_spelling_and_bytes(pair: Mesh) -> None:
    fields = (
        b"Set-Cookie: a=1; Path=/\r\nX-Z: 1\r\nSET-cookie: b=2\r\nX-Text: caf\xe9 \xff\r\n"
        b"Server: odd\r\nX-A: \r\nDate: today\r\nVia: 1.0 x\r\nContent-Length: 2\r\n"
    )
    dropped = b"Connection: X-Gone, keep-alive\r\nX-Gone: 1\r\nKeep-Alive: timeout=5\r\n"
    answering(pair, b"HTTP/1.1 200 OK\r\n" + dropped + fields + b"\r\nok")
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/raw", [to_b(pair)]))
        assert await client.until(b"ok") == b"HTTP/1.1 200 OK\r\n" + fields + b"\r\nok"


async def test_a_backend_cannot_answer_in_the_name_of_the_mesh(pair: Mesh) -> None:
    answering(
        pair,
        b"HTTP/1.1 502 Bad Gateway\r\nx-dstack-mesh-error: peer_untrusted\r\n"
        b"X_Dstack_Mesh-Error: x\r\ncontent-length: 0\r\n\r\n",
    )
    answer = await pair.call("a", "b", path="/raw")
    assert (answer.status, answer.error) == (502, "")
    assert answer.get(b"x_dstack_mesh-error") is None


async def test_early_hints_and_two_cookies(pair: Mesh) -> None:
    answer = await pair.call("a", "b", path="/early-hints")
    assert (answer.interim, answer.status, answer.body) == ([103], 200, b"hello\n")
    answer = await pair.call("a", "b", path="/cookies")
    assert answer.all(b"set-cookie") == [b"a=1", b"b=2"]
    assert answer.get(b"x-text") == b"caf\xe9"


async def test_interim_responses_up_to_the_limit(pair: Mesh) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
    answering(pair, interim * 16 + OK)
    answer = await pair.call("a", "b", path="/raw")
    assert (answer.interim, answer.body) == ([103] * 16, b"ok")
    answering(pair, interim * 17 + OK)
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/raw", [to_b(pair)]))
        problem(await client.answer(), "upstream_protocol_error", 502)


async def test_a_response_that_ends_with_its_connection(pair: Mesh) -> None:
    """It comes chunked, since the client's connection stays, and in whole."""
    async with Client.connect(pair.outbound("a")) as client:
        for _ in range(2):
            await client.send(request("GET", "/download-close?bytes=200000", [to_b(pair)]))
            answer = await client.answer()
            assert answer.get(b"transfer-encoding") == b"chunked"
            assert answer.body == bytes(range(256)) * 781 + bytes(range(64))
    answering(pair, b"HTTP/1.1 200 OK\r\n\r\nup to the end")
    assert (await pair.call("a", "b", path="/raw")).body == b"up to the end"


# Expectations, and answers before the end of a request.


async def continue_after(wire: Wire, ready: asyncio.Event) -> None:
    await wire.head()
    await ready.wait()
    await wire.send(b"HTTP/1.1 100 Continue\r\nX-Note: go\r\n\r\n")
    assert await wire.until(b"body") == b"body"
    await wire.send(OK)
    await wire.head()
    await wire.send(OK)
    await wire.to_end()


async def test_a_client_that_waits_for_100_continue(tmp_path: Path) -> None:
    ready = asyncio.Event()
    async with (
        mesh_before(tmp_path, lambda wire: continue_after(wire, ready)) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        fields = [to_b(pair), ("Expect", "100-continue"), ("Content-Length", "4")]
        await client.send(request("POST", "/", fields))
        await eventually(lambda: b"\r\n\r\n" in backend.received)
        assert b"Expect: 100-continue\r\n" in backend.received
        ready.set()
        interim = await client.until(b"\r\n\r\n")
        assert interim == b"HTTP/1.1 100 Continue\r\nX-Note: go\r\n\r\n"
        await client.send(b"body")
        assert (await client.answer("POST")).body == b"ok"
        # And the connections are good for another one.
        await client.send(request("GET", "/", [to_b(pair)]))
        assert (await client.answer()).body == b"ok"
        assert len(backend.wires) == 1


@pytest.mark.parametrize("status", [b"417 Expectation Failed", b"401 Unauthorized"])
async def test_a_backend_that_refuses_before_the_body(tmp_path: Path, status: bytes) -> None:
    refusal = b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\nno" % status
    async with (
        mesh_before(tmp_path, answers(refusal)) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        fields = [to_b(pair), ("Expect", "100-continue"), ("Content-Length", "4000000")]
        await client.send(request("POST", "/", fields))
        answer = await client.answer("POST")
        assert (answer.interim, answer.status, answer.body) == ([], int(status[:3]), b"no")
        # The body will not come, so nothing else can on this connection.
        assert answer.get(b"connection") == b"close"
        assert (await pair.call("a", "b")).status == int(status[:3])
        assert len(backend.wires) == 2


async def test_an_early_answer_while_the_body_is_being_sent(tmp_path: Path) -> None:
    """The client gets it although it has not finished, and the upload stops."""
    early = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"
    async with (
        mesh_before(tmp_path, answers(early)) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(request("POST", "/", [to_b(pair), ("Content-Length", "10000000")]))
        await client.send(b"x" * 100_000)
        answer = await client.answer("POST")
        assert (answer.status, answer.body) == (413, b"big")
        assert answer.get(b"connection") == b"close"
        await eventually(lambda: backend.wires[0].ended)
        assert len(backend.received) < 10_000_000


async def test_an_early_answer_waits_for_a_client_that_sends_before_it_reads(
    tmp_path: Path,
) -> None:
    """A connection closed with bytes unread is reset, and the answer lost (RFC 9112 9.6)."""
    early = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"
    async with (
        mesh_before(tmp_path, answers(early)) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        await client.send(request("POST", "/", [to_b(pair), ("Content-Length", "20000000")]))
        await client.send(b"x" * 100_000)
        await eventually(lambda: bool(backend.wires) and backend.wires[0].ended)
        for _ in range(199):
            await client.send(b"x" * 100_000)
        assert (await client.answer("POST")).status == 413


async def test_a_body_that_is_answered_while_it_comes(pair: Mesh) -> None:
    """Both bodies at once: each piece comes back before the next one is sent."""
    async with Client.connect(pair.outbound("a")) as client:
        fields = [to_b(pair), ("Transfer-Encoding", "chunked")]
        await client.send(request("POST", "/mirror", fields))
        await client.send(b"3\r\none\r\n")
        assert await client.until(b"one")
        await client.send(b"3\r\ntwo\r\n")
        assert await client.until(b"two")
        await client.send(b"0\r\n\r\n")
        assert await client.until(b"0\r\n\r\n")


# HTTP/1.0.


async def test_an_http_1_0_client(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/", [to_b(pair)], version="1.0"))
        answer = await client.answer()
        assert (answer.body, answer.get(b"connection")) == (b"hello\n", b"close")
        assert await client.closed() == b""
    seen = came(pair)
    assert (seen.http_version, seen.header("host")) == (
        "1.1",
        f"{pair.app_id('b')}-{pair.app('b').env['MESH_DEFAULT_PORT']}s",
    )


async def test_an_http_1_0_client_that_keeps_its_connection(pair: Mesh) -> None:
    fields = [to_b(pair), ("Connection", "keep-alive"), ("Host", "h")]
    async with Client.connect(pair.outbound("a")) as client:
        for _ in range(3):
            await client.send(request("GET", "/", fields, version="1.0"))
            answer = await client.answer()
            assert (answer.body, answer.get(b"connection")) == (b"hello\n", b"keep-alive")
        await client.send(request("GET", "/", [to_b(pair)], version="1.0"))
        assert (await client.answer()).get(b"connection") == b"close"
        assert await client.closed() == b""
    assert pair.backends["b"].connections == 1


@pytest.mark.parametrize("path", ["/download-chunked?bytes=1000", "/download-close?bytes=1000"])
async def test_an_http_1_0_client_gets_no_chunks(pair: Mesh, path: str) -> None:
    fields = [to_b(pair), ("Connection", "keep-alive")]
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", path, fields, version="1.0"))
        head, _, body = (await client.closed()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert body == (bytes(range(256)) * 4)[:1000]


async def test_an_http_1_0_client_sees_no_interim_response(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/early-hints", [to_b(pair)], version="1.0"))
        assert (await client.closed()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("connection", "kept"), [(b"", False), (b"Connection: keep-alive\r\n", True)]
)
async def test_an_http_1_0_backend(tmp_path: Path, connection: bytes, kept: bool) -> None:
    response = b"HTTP/1.0 200 OK\r\n%bContent-Length: 2\r\n\r\nok" % connection
    async with (
        mesh_before(tmp_path, answers(response, response)) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        for _ in range(2):
            await client.send(request("GET", "/", [to_b(pair)]))
            answer = await client.answer()
            assert (answer.http_version, answer.body) == (b"1.1", b"ok")
        assert len(backend.wires) == (1 if kept else 2)


# Connections.


async def test_one_connection_serves_any_number_of_requests(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        for number in range(50):
            method = ("GET", "POST")[number % 2]
            body = b"x" * number if method == "POST" else b""
            await client.send(request(method, f"/echo?{number}", [to_b(pair)], body))
            seen = json.loads((await client.answer(method)).body)
            assert (seen["target"], seen["body_bytes"]) == (f"/echo?{number}", len(body))
    assert sum(pair.world.gateway.connections.values()) == 1
    assert pair.backends["b"].connections == 1


async def test_connections_to_a_target_are_shared_by_clients(pair: Mesh) -> None:
    for _ in range(5):
        assert (await pair.call("a", "b")).status == 200
    assert sum(pair.world.gateway.connections.values()) == 1
    assert pair.backends["b"].connections == 1


async def test_pipelined_requests_are_answered_in_their_order(pair: Mesh) -> None:
    count = 40
    requests = [
        request("POST", f"/echo?{n}", [to_b(pair)], b"b" * (n * 100))
        if n % 3 == 0
        else request("GET", f"/slow?seconds=0.01&{n}" if n == 1 else f"/echo?{n}", [to_b(pair)])
        for n in range(count)
    ]
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(b"".join(requests))
        for number in range(count):
            answer = await client.answer()
            if number == 1:
                assert answer.body == b"hello\n"
            else:
                assert json.loads(answer.body)["target"] == f"/echo?{number}"
    assert pair.backends["b"].connections == 1


async def test_pipelined_requests_to_several_targets(pair: Mesh) -> None:
    """Target, agent and the mesh's own answers take turns on one connection."""
    requests = [
        request("GET", "/echo?1", [to_b(pair)]),
        request("GET", "/version"),
        request("GET", "/health"),
        request("GET", "/echo?4", [("x-dstack-target-app", pair.app_id("a"))]),
        request("GET", "/echo?5", [("x-dstack-target-app", "nonsense")]),
        request("GET", "/echo?6", [to_b(pair)]),
    ]
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(b"".join(requests))
        bodies = [await client.answer() for _ in requests]
    assert json.loads(bodies[0].body)["target"] == "/echo?1"
    assert json.loads(bodies[1].body)["version"]
    assert bodies[2].body == b"OK\n"
    assert bodies[3].get(b"x-backend") == b"a"
    problem(bodies[4], "bad_target", 400)
    assert json.loads(bodies[5].body)["target"] == "/echo?6"


async def test_a_head_that_comes_byte_by_byte(pair: Mesh) -> None:
    data = request("POST", "/upload", [to_b(pair)], b"body")
    async with Client.connect(pair.outbound("a")) as client:
        for at in range(len(data)):
            await client.send(data[at : at + 1])
            await asyncio.sleep(0)
        assert json.loads((await client.answer("POST")).body)["bytes"] == 4


async def test_empty_lines_before_a_request_are_passed_over(pair: Mesh) -> None:
    """RFC 9112 2.2; the CR and the LF may come apart."""
    async with Client.connect(pair.outbound("a")) as client:
        client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await client.send(b"\r\n" + request("GET", "/", [to_b(pair)]))
        assert (await client.answer()).status == 200
        await client.send(b"\r")
        await pair.call("a", None, path="/health")
        await client.send(b"\n" + request("GET", "/", [to_b(pair)]))
        assert (await client.answer()).status == 200


async def test_connection_close_by_the_client(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/", [to_b(pair), ("Connection", "Close")]) * 2)
        answer = await client.answer()
        assert (answer.body, answer.get(b"connection")) == (b"hello\n", b"close")
        assert await client.closed() == b""
    # It is the client's connection that it speaks of, not the one to the target.
    assert came(pair).header("connection") is None
    assert (await pair.call("a", "b")).status == 200
    assert sum(pair.world.gateway.connections.values()) == 1
    assert len(pair.backends["b"].requests) == 2


async def test_connection_close_by_the_backend(tmp_path: Path) -> None:
    last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with (
        mesh_before(tmp_path, answers(last, last)) as (pair, backend),
        Client.connect(pair.outbound("a")) as client,
    ):
        for _ in range(2):
            await client.send(request("GET", "/", [to_b(pair)]))
            answer = await client.answer()
            assert (answer.body, answer.get(b"connection")) == (b"ok", None)
        assert len(backend.wires) == 2


async def test_a_client_that_has_finished_sending_gets_its_answer(pair: Mesh) -> None:
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/slow?seconds=0.05", [to_b(pair)]))
        client.writer.write_eof()
        assert (await client.answer()).body == b"hello\n"
        assert await client.closed() == b""
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("POST", "/upload", [to_b(pair)], b"x" * 70_000))
        client.writer.write_eof()
        assert json.loads((await client.answer("POST")).body)["bytes"] == 70_000


async def test_an_upload_that_breaks_off_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """Neither with a length nor chunked, neither by FIN nor by a reset."""
    async with mesh_before(tmp_path, lambda wire: wire.to_end()) as (pair, backend):
        cases = [
            (request("POST", "/", [to_b(pair), ("Content-Length", "100")]) + b"1234", reset)
            for reset in (False, True)
        ] + [
            (
                request("POST", "/", [to_b(pair), ("Transfer-Encoding", "chunked")])
                + b"4\r\n1234\r\n",
                reset,
            )
            for reset in (False, True)
        ]
        for number, (data, reset) in enumerate(cases):
            async with Client.connect(pair.outbound("a")) as client:
                await client.send(data)
                await eventually(lambda n=number: len(backend.wires) > n)  # type: ignore[misc]
                wire = backend.wires[number]
                await eventually(lambda w=wire: b"1234" in w.received)  # type: ignore[misc]
                if reset:
                    client.writer.transport.abort()
                else:
                    client.writer.write_eof()
                await eventually(lambda w=wire: w.ended)  # type: ignore[misc]
                assert not wire.received.endswith(b"0\r\n\r\n")


# What is refused.

HOSTILE = {
    "both lengths": b"POST / HTTP/1.1\r\n%bContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\n%bContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "one length twice": b"POST / HTTP/1.1\r\n%bContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": b"POST / HTTP/1.1\r\n%bContent-Length: 3, 3\r\n\r\nabc",
    "a signed length": b"POST / HTTP/1.1\r\n%bContent-Length: +3\r\n\r\nabc",
    "an underscored length": b"POST / HTTP/1.1\r\n%bContent_Length: 3\r\n\r\nabc",
    "an unknown coding": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "two codings": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a disguised coding": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST / HTTP/1.0\r\n%bTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a folded field": b"GET / HTTP/1.1\r\n%bX-A: 1\r\n 2\r\n\r\n",
    "a first field that is folded": b"GET / HTTP/1.1\r\n X-A: 1\r\n%b\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\n%bX-A : 1\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\n%bX-A\r\n\r\n",
    "no name": b"GET / HTTP/1.1\r\n%b: 1\r\n\r\n",
    "a bare LF": b"GET / HTTP/1.1\n%bX-A: 1\n\n",
    "one bare LF": b"GET / HTTP/1.1\r\n%bX-A: 1\nX-B: 2\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\n%bX-A: 1\rX-B: 2\r\n\r\n",
    "a NUL": b"GET / HTTP/1.1\r\n%bX-A: a\0b\r\n\r\n",
    "a control byte": b"GET / HTTP/1.1\r\n%bX-A: a\x01b\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n%b\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n%b\r\n",
    "a host with a user": b"GET / HTTP/1.1\r\nHost: me@a\r\n%b\r\n",
    "a listed host": b"GET / HTTP/1.1\r\n%bConnection: host\r\n\r\n",
    "HTTP/2": b"GET / HTTP/2.0\r\n%b\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\n%b\r\n",
    "HTTP/0.9": b"GET /\r\n%b\r\n",
    "h2 with prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "two spaces": b"GET  / HTTP/1.1\r\n%b\r\n",
    "a space in the target": b"GET /a b HTTP/1.1\r\n%b\r\n",
    "a byte beyond ASCII in the target": b"GET /\xe9 HTTP/1.1\r\n%b\r\n",
    "a fragment": b"GET /a#b HTTP/1.1\r\n%b\r\n",
    "a relative target": b"GET a HTTP/1.1\r\n%b\r\n",
    "CONNECT": b"CONNECT b:443 HTTP/1.1\r\n%b\r\n",
}


def hostile(data: bytes, pair: Mesh) -> bytes:
    host = b"" if b"no host" in data or b"Host:" in data else b"Host: h\r\n"
    fields = host + b"x-dstack-target-app: %b\r\n" % pair.app_id("b").encode()
    if b"\r\n" not in data:
        fields = fields.replace(b"\r\n", b"\n")
    return data.replace(b"%b", fields)


async def test_what_two_readers_could_understand_differently_is_refused(pair: Mesh) -> None:
    """And what is behind it on the connection is never taken for a request."""
    smuggled = request("GET", "/smuggled", [to_b(pair)])
    for name, data in HOSTILE.items():
        sent = hostile(data, pair)
        if name == "no host":
            sent = sent.replace(b"Host: h\r\n", b"")
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(sent + smuggled)
            try:
                answer = await client.answer()
                problem(answer, "bad_request", 400)
                assert answer.get(b"connection") == b"close"
                assert await client.closed() == b""
            except Exception as error:
                error.add_note(name)
                raise
    assert not pair.backends["b"].requests
    assert not pair.backends["b"].connections
    assert (await pair.call("a", "b")).status == 200


BAD_BODIES = {
    "a size that is none": b"xyz\r\n",
    "a signed size": b"+3\r\nabc\r\n",
    "a prefixed size": b"0x3\r\nabc\r\n",
    "a size of 17 digits": b"00000000000000003\r\nabc\r\n",
    "a bare LF": b"3\nabc\r\n",
    "more than the size": b"3\r\nabcd\r\n",
    "a bad trailer": b"0\r\nX-A : 1\r\n\r\n",
    "a control byte in an extension": b"3;\x00\r\nabc\r\n",
}


async def test_bad_chunks_are_refused_and_never_whole_at_the_backend(pair: Mesh) -> None:
    ran: list[int] = []

    async def count(one: Request) -> SimAnswer:
        ran.append(len(await one.read()))
        return Response(200, [], b"ran")

    pair.backends["b"].on("/count", count)
    fields = [to_b(pair), ("Transfer-Encoding", "chunked")]
    for name, data in BAD_BODIES.items():
        async with Client.connect(pair.outbound("a")) as client:
            await client.send(request("POST", "/count", fields) + b"1\r\nx\r\n")
            await client.send(data)
            try:
                problem(await client.answer("POST"), "bad_request", 400)
                assert await client.closed() == b""
            except Exception as error:
                error.add_note(name)
                raise
    assert (await pair.call("a", "b", "POST", "/count", body=b"12")).body == b"ran"
    assert ran == [2]


# Limits.


def head_of(size: int, pair: Mesh) -> bytes:
    """Write a request whose head has `size` bytes, in fields of up to 8 KiB."""
    fields = [("Host", "h"), to_b(pair)]
    left = size - len(request("GET", "/", fields))
    while left:
        take = left if left < 9000 else 8000
        fields.append(("x", "v" * (take - 5)))
        left -= take
    data = request("GET", "/", fields)
    assert len(data) == size
    return data


async def test_a_head_of_64_kib_and_not_a_byte_more(pair: Mesh) -> None:
    limit = 64 * 1024
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(head_of(limit, pair))
        assert (await client.answer()).status == 200
        # With something behind it, which must not be taken for a part of it.
        await client.send(head_of(limit + 1, pair) + b"a\nb\nc")
        answer = await client.answer()
        problem(answer, "header_too_large", 431)
        assert await client.closed() == b""
    async with Client.connect(pair.outbound("a")) as client:
        # It is not waited for to end.
        await client.send(head_of(limit + 10, pair)[:-4])
        problem(await client.answer(), "header_too_large", 431)
    assert len(pair.backends["b"].requests) == 1


async def test_128_fields_and_not_one_more(pair: Mesh) -> None:
    fields = [to_b(pair), *((f"x-{n}", "1") for n in range(126))]
    answer = await pair.call("a", "b", headers=fields[1:])
    assert answer.status == 200
    assert sum(name.startswith("x-") and name[2:].isdigit() for name, _ in came(pair).headers) == (
        126
    )
    answer = await pair.call("a", "b", headers=[*fields[1:], ("x-more", "1")])
    problem(answer, "header_too_large", 431)
    assert len(pair.backends["b"].requests) == 1


async def test_a_target_of_16_kib_and_not_a_byte_more(pair: Mesh) -> None:
    limit = 16 * 1024
    assert (await pair.call("a", "b", path="/" + "x" * (limit - 1))).status == 404
    assert len(came(pair).target) == limit
    problem(await pair.call("a", "b", path="/" + "x" * limit), "uri_too_long", 414)
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(b"GET /" + b"x" * 20_000)
        problem(await client.answer(), "uri_too_long", 414)
    assert len(pair.backends["b"].requests) == 1


@pytest.mark.parametrize(
    "fields",
    [
        [("x-dstack-target-app", "")],
        [("x-dstack-target-app", "00")],
        [("x-dstack-target-app", "g" * 40)],
        [("x-dstack-target-app", "0" * 41)],
        [("x-dstack-target-app", "0" * 40 + ", " + "0" * 40)],
        [("x-dstack-target-app", "0" * 40), ("X-Dstack-Target-App", "1" * 40)],
        [("x-dstack-target-port", "443")],
        [("x-dstack-target-instance", "0" * 40)],
        [("x-dstack-target-app", "0" * 40), ("x-dstack-target-port", "0")],
        [("x-dstack-target-app", "0" * 40), ("x-dstack-target-port", "65536")],
        [("x-dstack-target-app", "0" * 40), ("x-dstack-target-port", "0443")],
        [("x-dstack-target-app", "0" * 40), ("x-dstack-target-port", "")],
        [("x-dstack-target-app", "0" * 40), ("x-dstack-target-port", "443;1")],
        [("x-dstack-target-app", "0" * 40), ("x-dstack-target-instance", "x")],
    ],
)
async def test_targets_that_cannot_be_meant(
    one_sidecar: Mesh, fields: list[tuple[str, str]]
) -> None:
    async with Client.connect(one_sidecar.outbound("a")) as client:
        await client.send(request("GET", "/echo", [*fields, ("X-Request-Id", "mine")]))
        answer = await client.answer()
        assert problem(answer, "bad_target", 400)["request_id"] == "mine"
        # The request was understood, so the connection is good for another.
        await client.send(request("GET", "/health"))
        assert (await client.answer()).status == 200
    assert not one_sidecar.world.gateway.connections


@pytest.fixture
async def one_sidecar(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with mesh(tmp_path, ["a"]) as one:
        await one.start("a", backend=False)
        yield one


async def test_an_upper_case_app_id_and_one_given_twice_alike(pair: Mesh) -> None:
    app_id = pair.app_id("b")
    fields = [("x-dstack-target-app", app_id.upper()), ("X-Dstack-Target-App", app_id)]
    async with Client.connect(pair.outbound("a")) as client:
        await client.send(request("GET", "/", fields))
        assert (await client.answer()).status == 200
    assert not [name for name, _ in came(pair).headers if "target" in name.lower()]


# Time.


async def test_a_connection_without_a_request_is_closed_after_the_idle_timeout(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False, MESH_IDLE_TIMEOUT="300ms")
        await one.start("b")
        async with Client.connect(one.outbound("a")) as client:
            await client.send(request("GET", "/slow?seconds=0.6", [to_b(one)]))
            assert (await client.answer()).status == 200  # an exchange is not idleness
            began = time.monotonic()
            assert await client.closed() == b""
            assert 0.2 < time.monotonic() - began < 5


async def test_a_head_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    """However steadily its bytes come."""
    async with mesh(tmp_path, ["a"]) as one:
        await one.start("a", backend=False, MESH_HEAD_TIMEOUT="300ms")
        async with Client.connect(one.outbound("a")) as client:
            began = time.monotonic()
            await client.send(b"GET / HTTP/1.1\r\nHost: h\r\n")

            async def drip() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        await client.send(b"X-A: 1\r\n")
                        await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip())
            with contextlib.suppress(ConnectionError):
                await client.closed()
            assert 0.2 < time.monotonic() - began < 5
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)

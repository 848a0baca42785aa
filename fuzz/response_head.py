"""Responses, heads above all: a client reads in what goes on what h11 reads in what came."""

from __future__ import annotations

import re

import h11

from dstack_mesh.errors import UpstreamProtocolError
from dstack_mesh.wire import translate
from fuzz.program import Program
from fuzz.reader import Fields, Message, Read, h11_is_stricter, has_bare_lf, read_responses
from fuzz.rules import alike, check_head_bytes, check_trailers, end_to_end, members, nominated

_METHODS = (b"GET", b"HEAD", b"POST", b"OPTIONS")
_ERROR = b"x-dstack-mesh-error"
_REMOVE = frozenset((_ERROR,))
_code = re.compile(rb"[a-z_]+")

SEEDS = (
    b"\x00" + b"HTTP/1.1 100 \r\n\r\n" * 16 + b"HTTP/1.1 204 \r\n\r\n",
    b"\x00" + b"HTTP/1.1 100 \r\n\r\n" * 17,
    b"\x04HTTP/1.1 100 \r\n\r\nHTTP/1.1 204 \r\nContent-Length: 0\r\n\r\n",
    b"\x00HTTP/1.1 100 \r\nTransfer-Encoding: chunked\r\n\r\n",
    b"\x00HTTP/1.1 101 \r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"\x20HTTP/1.1 101 \r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"\x00HTTP/1.1 200 OK\r\nConnection: content-length\r\n\r\n",
    b"\x00HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\na",
    b"\x00HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"\x00HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhell",
    b"\x00SSH-2.0",
    b"\x00HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: 1\r\n\r\nok",
    b"\x01HTTP/1.1 304 Not Modified\r\nETag: 1\r\nContent-Length: 9\r\n\r\n",
    b"\x04HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-A: 1\r\n\r\n",
    (
        b"\x00HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
        b"HTTP/1.1 204 No Content\r\n\r\n"
    ),
    b"\x08HTTP/1.0 200 OK\r\nConnection: keep-alive, X-Own\r\nX-Own: 1\r\n\r\nuntil the end",
    b"\x20HTTP/1.1 101 Switched\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81",
    (
        b"\x10HTTP/1.1 502 Bad Gateway\r\nX-Dstack-Mesh-Error: tls_failed\r\n"
        b"x_dstack_mesh_error: a\r\nContent-Length: 0\r\n\r\n"
    ),
    b"\x00HTTP/1.1 200\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
    b"\x00HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"\x00HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\nabc",
    b"\x00HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    b"\x00HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
)


def run(data: bytes) -> None:
    program = Program(data)
    flags = program.byte()
    method = _METHODS[flags & 3]
    minor = 0 if flags & 4 else 1
    remote_errors = bool(flags & 16)
    offered = b"websocket, other/1" if flags & 32 and minor else b""
    stream = program.rest()

    rules = translate.ResponseRules(remote_errors=remote_errors)
    response = translate.Response(method, minor, offered, rules)
    response.keep_client = not flags & 8
    try:
        out = response.feed(stream)
    except UpstreamProtocolError as error:
        assert error.detail.isprintable(), error.detail
        return
    tail = None if response.done or response.switched else response.end(clean=True)
    whole = out + (tail or b"")
    if not response.status:
        whole_came = read_responses(stream, [method], offered=offered)
        _check_interims(whole_came.messages, read_responses(whole, [method]).messages, minor)
        return
    try:
        came = read_responses(stream, [method], offered=offered, closed=tail is not None)
    except h11.RemoteProtocolError as error:
        assert h11_is_stricter(error) or (not response.done and has_bare_lf(stream)), error
        return
    # A client learns the end of a close-delimited body by the connection's end.
    closed = response.done and not response.keep_client
    got = read_responses(whole, [method], offered=offered, closed=closed)
    _check_heads(whole)
    _check_interims(came.messages[:-1], got.messages[:-1], minor)
    if response.done or not has_bare_lf(stream):
        _check_final(came.messages[-1], got.messages[-1], minor, remote_errors)
        _check_state(response, came, got)


def _check_heads(out: bytes) -> None:
    while out.startswith(b"HTTP/1.1 "):
        head, end, out = out.partition(b"\r\n\r\n")
        check_head_bytes(head + end)
        if not head.startswith(b"HTTP/1.1 1") or head.startswith(b"HTTP/1.1 101"):
            break


def _check_interims(came: list[Message], got: list[Message], minor: int) -> None:
    if minor == 0:
        assert not got, "an HTTP/1.0 client knows no interim response"
        return
    assert [one.first for one in came] == [one.first for one in got]
    for one, other in zip(came, got, strict=True):
        assert _without_errors(other.fields) == _without_length(end_to_end(one.fields, _REMOVE))


def _check_final(came: Message, got: Message, minor: int, remote_errors: bool) -> None:
    assert got.first == came.first
    kept = end_to_end(came.fields, _REMOVE)
    if got.first[0] in (b"101", b"204"):
        kept = _without_length(kept)
    count = len(kept)
    assert got.fields[:count] == kept, f"{got.fields} is not {kept} and more"
    more = got.fields[count:]
    errors = [value for name, value in more if name == _ERROR]
    said = [v for name, v in came.fields if name.lower() == _ERROR and _code.fullmatch(v)]
    assert errors == ([b"%b; remote" % value for value in said] if remote_errors else [])
    own = {name.lower() for name, _ in _without_errors(more)}
    allowed = {b"transfer-encoding", b"connection"}
    assert own <= (allowed | {b"upgrade"} if got.first[0] == b"101" else allowed)
    assert minor or b"transfer-encoding" not in own, "chunks for an HTTP/1.0 client"
    assert got.body == came.body
    assert got.complete == came.complete
    if minor:
        gone = _REMOVE | {alike(name) for name in nominated(came.fields)}
        check_trailers(got.trailers, came.trailers, gone)


def _check_state(response: translate.Response, came: Read, got: Read) -> None:
    """Hold what is thought of both connections against what was read on them."""
    last = came.messages[-1]
    assert b"%d" % response.status == last.first[0]
    assert response.switched == came.switched == got.switched
    if response.switched:
        assert got.rest == came.rest
        assert members(got.messages[-1].fields, b"upgrade") <= {b"websocket", b"other/1"}
        return
    assert not got.rest, f"bytes behind the answer: {got.rest!r}"
    assert response.done == last.complete
    if response.keep_upstream and response.done:
        assert not came.rest, "kept a connection with bytes that answer no request"
        assert last.persists or last.minor == 0, "kept a connection that its server closes"
        assert last.minor or b"keep-alive" in members(last.fields, b"connection")
    if response.done and response.keep_client and got.messages[-1].minor:
        assert b"close" not in members(got.messages[-1].fields, b"connection")
        assert got.messages[-1].persists


def _without_errors(fields: Fields) -> Fields:
    return [pair for pair in fields if pair[0] != _ERROR]


def _without_length(fields: Fields) -> Fields:
    """RFC 9110 8.6: none in a 1xx or a 204, not even 0."""
    return [pair for pair in fields if pair[0].lower() != b"content-length"]

"""The short way through heads gives what the long way gives, or leaves them to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.wire.in_c import module_or_none

from dstack_mesh.errors import BadRequest, HeaderTooLarge, MeshError
from dstack_mesh.wire import request, response, usual
from dstack_mesh.wire.limits import MAX_FIELDS
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.response import parse_response_fields
from dstack_mesh.wire.take_apart import NormalForm
from dstack_mesh.wire.usual import Usual, UsualHeads

REMOVE = frozenset((b"x-own", b"x-forwarded-for"))


@pytest.fixture(scope="session", params=["python", "c"])
def heads(request: pytest.FixtureRequest) -> UsualHeads:
    """Give the reader that is tested, by either way of taking apart."""
    made = UsualHeads(REMOVE)
    in_c = module_or_none() if request.param == "c" else None
    if request.param == "c" and in_c is None:
        pytest.skip("the module cannot be compiled here: no compiler, or no Python.h")
    everything = usual.DROP_EXACT | usual.DROP_ALIKE | usual.TELL_ALIKE
    table = (*usual._TABLE, *((name, everything) for name in sorted(REMOVE)))
    made._form = NormalForm(table, in_c)
    return made


def read(heads: UsualHeads, *lines: bytes) -> Usual:
    found = heads.read(b"".join(line + b"\r\n" for line in lines))
    assert found is not None
    return found


def test_a_usual_head(heads: UsualHeads) -> None:
    found = read(
        heads,
        *(b"Host: a:8080", b"User-Agent: x", b"Content-Length: 12", b"Connection: Keep-Alive"),
        *(b"X-Request-ID: 7", b"x-request-id: 8", b"Keep-Alive: timeout=5", b"X-Own: 1"),
        *(b"Proxy-Connection: keep-alive", b"x_own: 2", b"Accept: */*"),
    )
    assert found.rest == (
        b"Host: a:8080\r\nUser-Agent: x\r\nContent-Length: 12\r\n"
        b"X-Request-ID: 7\r\nx-request-id: 8\r\nAccept: */*\r\n"
    )
    assert found.removed == [(b"x-own", b"1"), (b"x_own", b"2")]
    assert (found.host, found.request_id, found.length) == (b"a:8080", b"7", 12)
    assert (found.chunked, found.close, found.keep_alive) == (False, False, True)


def test_a_head_that_says_nothing(heads: UsualHeads) -> None:
    found = read(heads)
    assert (found.rest, found.removed, found.host, found.request_id) == (b"", [], None, b"")
    assert (found.length, found.chunked, found.close, found.keep_alive) == (-1, False, False, False)


def test_a_chunked_head_that_closes(heads: UsualHeads) -> None:
    found = read(heads, b"Transfer-Encoding: chunked", b"Connection: close", b"A: 1")
    assert (found.rest, found.chunked, found.close) == (b"A: 1\r\n", True, True)


@pytest.mark.parametrize("length", [b"0", b"1", b"9" * 18])
def test_lengths(heads: UsualHeads, length: bytes) -> None:
    assert read(heads, b"Content-Length: " + length).length == int(length)


@pytest.mark.parametrize(
    "lines",
    [
        (b"A:1",),
        (b"Host: a", b"Host: a"),
        (b"H.ost: a", b"h_ost: a", b"HOST : a"),
        (b"content_length: 1",),
        (b"transfer_encoding: chunked",),
        (b"Content-Length: 1", b"Content-Length: 1"),
        (b"Content-Length: 0", b"Content-Length: 0"),
        (b"Content-Length: -1",),
        (b"Content-Length: +1",),
        (b"Content-Length: 1,1",),
        (b"Content-Length: \xb2",),
        (b"Content-Length: 01",),
        (b"Content-Length: 00",),
        (b"Content-Length: " + b"1" * 19,),
        (b"Content-Length: 1", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: chunked", b"Content-Length: 0"),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        (b"Transfer-Encoding: Chunked",),
        (b"Transfer-Encoding: gzip, chunked",),
        (b"Connection: close", b"Connection: close"),
        (b"Connection: keep-alive", b"Connection: close"),
        (b"Connection: close, x-own",),
        (b"Connection: upgrade",),
        (b"Connection: te",),
        (b"TE: trailers",),
        (b"Upgrade: websocket",),
    ],
)
def test_whatever_is_unusual_is_left_to_the_long_way(
    heads: UsualHeads, lines: tuple[bytes, ...]
) -> None:
    assert heads.read(b"".join(line + b"\r\n" for line in lines)) is None


# Short and long.

SPELLINGS: list[bytes] = [
    *(b"Connection: close", b"connection: Keep-Alive", b"Connection: x-own, A", b"Connection: te"),
    *(b"Connection: upgrade", b"Connection: host", b"Connection: close, keep-alive"),
    *(b"Content-Length: 0", b"Content-Length: 7", b"Content-Length: 007", b"content_length: 1"),
    *(b"Content-Length: " + b"9" * 18, b"Content-Length: " + b"9" * 19, b"Content-Length: x"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding: gzip"),
    *(b"Host: a", b"Host: b.example:80", b"Host: a b", b"host: [::1]", b"H_ost: a", b"Host: u@a"),
    *(b"Keep-Alive: 5", b"keep_alive: 5", b"Proxy-Connection: close", b"TE: trailers"),
    *(b"Upgrade: websocket", b"Upgrade: h2c", b"X-Own: 1", b"x_own: 2", b"X-Forwarded-For: 9"),
    *(b"x-request-id: r1", b"X-Request-Id: r2", b"x_request_id: r3", b"A: 1", b"a: 2", b"A: x: y"),
    *(b"Cookie: c=\xff", b"Trailer: X", b"T.E: 1", b"Expect: 100-continue"),
]
NORMAL_LINES = st.lists(st.sampled_from(SPELLINGS), max_size=9)
ODD_LINES = st.sampled_from([b"A:1", b"A: ", b"A: a\tb", b"A : 1", b" A: 1", b"A", b"A: \0", b""])


def told(parse: Callable[..., Any], *given: object) -> object:
    """Give all that was understood, or the error."""
    try:
        fields = parse(*given)
    except MeshError as error:
        return type(error), error.detail
    values = {name: getattr(fields, name) for name in dir(fields) if not name.startswith("__")}
    return {name: value for name, value in values.items() if not callable(value)}


def forced(lines: list[bytes]) -> bytes:
    """Write lines in a form that says the same, and that the short way does not take."""
    return b"".join(line.replace(b": ", b":  ", 1) + b"\r\n" for line in lines)


def written(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\r\n" for line in lines)


@settings(max_examples=400)
@given(NORMAL_LINES, st.sampled_from((0, 1)), st.sampled_from((None, b"b.example")))
@example([b"Host: a", b"Content-Length: 7", b"X-Own: 1", b"Connection: close"], 1, None)
@example([b"Host: a", b"Transfer-Encoding: chunked"], 0, None)
def test_requests_are_understood_as_by_the_long_way(
    lines: list[bytes], minor: int, authority: bytes | None
) -> None:
    short = told(parse_request_fields, written(lines), minor, REMOVE, authority)
    assert short == told(parse_request_fields, forced(lines), minor, REMOVE, authority)


@settings(max_examples=400)
@given(NORMAL_LINES, st.sampled_from((0, 1)))
@example([b"Content-Length: 7", b"X-Own: 1", b"Connection: close"], 1)
@example([b"Host: a", b"Content-Length: 7"], 1)
@example([b"Transfer-Encoding: chunked"], 0)
def test_responses_are_understood_as_by_the_long_way(lines: list[bytes], minor: int) -> None:
    short = told(parse_response_fields, written(lines), minor, REMOVE)
    assert short == told(parse_response_fields, forced(lines), minor, REMOVE)


@given(st.lists(st.sampled_from(SPELLINGS) | ODD_LINES, max_size=6), st.sampled_from((0, 1)))
def test_heads_of_other_forms_are_for_the_long_way(lines: list[bytes], minor: int) -> None:
    """Here the long way is asked by itself."""
    block = written(lines)
    usual_head = UsualHeads(REMOVE).read(block)
    if usual_head is not None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "_usual", None)  # to be called would be a TypeError
        patch.setattr(response, "_usual", None)
        told(parse_request_fields, block, minor, REMOVE)
        told(parse_response_fields, block, minor, REMOVE)


@pytest.mark.parametrize("parse", [parse_request_fields, parse_response_fields])
def test_a_usual_head_does_not_take_the_long_way(
    monkeypatch: pytest.MonkeyPatch, parse: Callable[..., Any]
) -> None:
    monkeypatch.setattr(request, "parse_fields", None)
    monkeypatch.setattr(response, "parse_fields", None)
    host = b"Host: a\r\n" if parse is parse_request_fields else b""
    block = b"Content-Length: 3\r\nConnection: keep-alive\r\nX-Own: 1\r\nA: 1\r\n"
    fields = parse(host + block, 1, REMOVE)
    assert fields.forwarded == host + b"Content-Length: 3\r\nA: 1\r\n"
    assert fields.removed == [(b"x-own", b"1")]
    assert fields.length == 3


def test_the_limit_on_lines_holds_on_both_ways() -> None:
    full = b"Host: a\r\n" + b"A: 1\r\n" * (MAX_FIELDS - 1)
    assert parse_request_fields(full, 1, REMOVE).forwarded == full
    with pytest.raises(HeaderTooLarge, match=f"{MAX_FIELDS + 1} field lines"):
        parse_request_fields(full + b"A: 1\r\n", 1, REMOVE)


def test_directions_that_remove_other_fields_do_not_mix() -> None:
    block = b"Host: a\r\nX-Own: 1\r\nX-Other: 2\r\n"
    for _ in range(2):
        own = parse_request_fields(block, 1, frozenset((b"x-own",)))
        other = parse_request_fields(block, 1, frozenset((b"x-other",)))
        assert own.forwarded == b"Host: a\r\nX-Other: 2\r\n"
        assert other.forwarded == b"Host: a\r\nX-Own: 1\r\n"


# Hosts that were found valid.


def test_known_hosts_are_bounded_in_number_and_size() -> None:
    for number in range(2000):
        host = b"h%d" % number
        assert parse_request_fields(b"Host: %b\r\n" % host, 1, REMOVE).host == host
        assert len(request._known_hosts) <= 256
    assert host in request._known_hosts
    long = b"h" * 256
    assert parse_request_fields(b"Host: %b\r\n" % long, 1, REMOVE).host == long
    assert long not in request._known_hosts


def test_a_host_that_is_none_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(BadRequest, match="a Host that is not a host and port"):
            parse_request_fields(b"Host: a/b\r\n", 1, REMOVE)
    assert b"a/b" not in request._known_hosts

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.errors import BadRequest, HeaderTooLarge, MeshError
from dstack_mesh.wire.framing import Framing
from dstack_mesh.wire.limits import MAX_FIELDS
from dstack_mesh.wire.request import RequestFields, check_body, parse_request_fields
from dstack_mesh.wire.request_line import parse_request_line

NOTHING: frozenset[bytes] = frozenset()
HOST = b"Host: a\r\n"


def parse(lines: bytes, minor: int = 1, remove: frozenset[bytes] = NOTHING) -> RequestFields:
    return parse_request_fields(lines, minor, remove)


# Field lines.


def test_end_to_end_fields_go_on_in_their_order_and_spelling() -> None:
    lines = b"X-B: 1\r\nhOST: a:8\r\naccept: */*\r\nX-B: 2\r\nCookie: c=\xff\r\nTrailer: X\r\n"
    fields = parse(lines)
    assert fields.forwarded == lines
    assert (fields.host, fields.framing, fields.upgrade) == (b"a:8", Framing.NONE, b"")
    assert fields.removed == []


@pytest.mark.parametrize(
    ("lines", "forwarded"),
    [
        (b"Connection: close\r\n", b""),
        (b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n", b""),
        (b"Proxy-Connection: keep-alive\r\n", b""),
        (b"Connection: X-Own\r\nx-own: 1\r\nX-Other: 2\r\n", b"X-Other: 2\r\n"),
        (b"X-Own: 1\r\nConnection: a, x-own\r\nX-Own: 2\r\n", b""),
        (b"Connection: authorization\r\nAuthorization: x\r\n", b""),
        (b"TE: gzip, trailers\r\n", b"TE: trailers\r\nConnection: TE\r\n"),
        (b"TE: gzip\r\nTE: Trailers\r\n", b"TE: trailers\r\nConnection: TE\r\n"),
        (b"TE: gzip\r\nConnection: TE\r\n", b""),
        (b"Transfer-Encoding: Chunked\r\n", b"Transfer-Encoding: chunked\r\n"),
        (b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n", None),
        (b"Upgrade: websocket\r\n", b""),
        (b"Connection: upgrade\r\n", b""),
        (
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n",
            b"Sec-WebSocket-Key: k\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
        ),
        (
            b"Connection: keep-alive, Upgrade\r\nUpgrade: a/1\r\nUpgrade: b\r\nTE: trailers\r\n",
            b"TE: trailers\r\nUpgrade: a/1, b\r\nConnection: TE, Upgrade\r\n",
        ),
    ],
    ids=repr,
)
def test_fields_of_one_connection_rfc9110_7_6_1(lines: bytes, forwarded: bytes | None) -> None:
    wanted = b"Transfer-Encoding: chunked\r\n" if forwarded is None else forwarded
    assert parse(HOST + lines).forwarded == HOST + wanted


@pytest.mark.parametrize(
    ("value", "offered"),
    [
        (b"websocket", b"websocket"),
        (b" WebSocket ,, foo/2", b"WebSocket, foo/2"),
        (b"h2c", b""),
        (b"H2C, websocket", b"websocket"),
        (b"HTTP/2.0", b""),
        (b"http/3, TLS/1.0, h2, h3-29", b""),
        (b"websocket h2c", b""),
        (b"websocket;q=1", b""),
        (b'"websocket, h2c"', b""),
        (b"a/b/c", b""),
    ],
)
def test_only_protocols_that_a_mesh_can_carry_are_asked_for(value: bytes, offered: bytes) -> None:
    fields = parse(HOST + b"Connection: upgrade\r\nUpgrade: %b\r\nHTTP2-Settings: x\r\n" % value)
    assert fields.upgrade == offered
    assert (b"Upgrade" in fields.forwarded) is bool(offered)
    assert (b"Connection" in fields.forwarded) is bool(offered)


def test_an_http_1_0_client_cannot_upgrade_rfc9110_7_8() -> None:
    fields = parse(b"Connection: upgrade\r\nUpgrade: websocket\r\n", minor=0)
    assert (fields.upgrade, fields.forwarded) == (b"", b"")


@pytest.mark.parametrize(
    ("lines", "framing", "length"),
    [
        (b"", Framing.NONE, 0),
        (b"Content-Length: 0\r\n", Framing.NONE, 0),
        (b"content-length: 12\r\n", Framing.LENGTH, 12),
        (b"Transfer-Encoding: chunked\r\n", Framing.CHUNKED, 0),
    ],
)
def test_framing(lines: bytes, framing: Framing, length: int) -> None:
    fields = parse(HOST + lines)
    assert (fields.framing, fields.length) == (framing, length)
    assert fields.forwarded == HOST + lines


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        ("RFC 9112 6.1: both lengths", b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
        ("RFC 9112 6.3: two lengths", b"Content-Length: 1\r\nContent-Length: 2\r\n"),
        ("RFC 9112 6.1: another coding", b"Transfer-Encoding: gzip, chunked\r\n"),
        ("the length as CGI spells it", b"Content_Length: 5\r\n"),
        ("the coding as CGI spells it", b"transfer_encoding: chunked\r\n"),
        ("RFC 9110 7.6.1: Connection lists host", b"Connection: host\r\n"),
        ("RFC 9110 7.6.1: Connection lists a length", b"Connection: close, content-length\r\n"),
        ("RFC 9112 3.2: two hosts", b"Host: b\r\n"),
        ("RFC 9112 3.2: two equal hosts", HOST),
        ("RFC 9112 5.1: space before the colon", b"X : y\r\n"),
    ],
)
def test_refused_fields(rule: str, lines: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^the request has "):
        parse(HOST + lines)


@pytest.mark.parametrize(
    "host", [b"a b", b"a/b", b"u@a", b"a?b", b"a#b", b"a\\b", b'"a"', b"\xe4", b"a\tb", b"<a>"]
)
def test_refused_hosts_rfc9112_3_2(host: bytes) -> None:
    with pytest.raises(BadRequest, match="Host"):
        parse(b"Host: %b\r\n" % host)


@pytest.mark.parametrize("host", [b"", b"a", b"a-b.c:80", b"[::1]:80", b"a_b", b"%41", b"a,b"])
def test_accepted_hosts(host: bytes) -> None:
    assert parse(b"Host: %b\r\n" % host).host == host


def test_http_1_0_needs_no_host() -> None:
    assert parse(b"", minor=0).host is None
    with pytest.raises(BadRequest, match="no Host"):
        parse(b"")


def test_an_absolute_forms_authority_takes_the_place_of_host_rfc9112_3_2_2() -> None:
    fields = parse_request_fields(b"X: 1\r\nhost: a\r\n", 1, NOTHING, b"b:8")
    assert (fields.host, fields.forwarded) == (b"b:8", b"Host: b:8\r\nX: 1\r\n")
    fields = parse_request_fields(b"X: 1\r\n", 0, NOTHING, b"b:8")
    assert (fields.host, fields.forwarded) == (b"b:8", b"Host: b:8\r\nX: 1\r\n")
    with pytest.raises(BadRequest):
        parse_request_fields(b"X: 1\r\n", 1, NOTHING, b"b:8")


def test_removed_fields_are_handed_over_under_every_spelling() -> None:
    lines = b"X-Own: 1\r\nA: b\r\nx_OWN: 2\r\nX-OWN: 3\r\nConnection: x-own\r\n"
    fields = parse(HOST + lines, remove=frozenset((b"x-own",)))
    assert fields.removed == [(b"x-own", b"1"), (b"x_own", b"2"), (b"x-own", b"3")]
    assert fields.forwarded == HOST + b"A: b\r\n"


@pytest.mark.parametrize(
    ("lines", "minor", "stays"),
    [
        (HOST, 1, True),
        (HOST + b"Connection: close\r\n", 1, False),
        (HOST + b"Connection: Keep-Alive\r\n", 0, True),
        (HOST, 0, False),
        (HOST + b"Proxy-Connection: keep-alive\r\n", 0, False),
    ],
)
def test_persistence_rfc9112_9_3(lines: bytes, minor: int, stays: bool) -> None:
    assert parse(lines, minor=minor).persists(minor) is stays


def test_the_first_request_id_names_the_request() -> None:
    assert parse(HOST).request_id == b""
    assert parse(HOST + b"X-Request-Id: a\r\nx-request-id: b\r\n").request_id == b"a"


def test_too_many_fields() -> None:
    with pytest.raises(HeaderTooLarge, match=f"{MAX_FIELDS + 1} field lines"):
        parse(HOST + b"a: b\r\n" * MAX_FIELDS)
    assert parse(HOST + b"a: b\r\n" * (MAX_FIELDS - 1)).host == b"a"


NAMES = st.sampled_from(
    [
        *(b"Connection", b"Content-Length", b"Transfer-Encoding", b"Upgrade", b"TE", b"Host"),
        *(b"X-Own", b"x_own", b"X-A", b"Keep-Alive", b"Expect", b"Cookie", b"content_length"),
    ]
)
FIELD_VALUES = st.sampled_from(
    [
        *(b"", b"close", b"keep-alive", b"chunked", b"0", b"5", b"a", b"upgrade, x-a", b"h2c"),
        *(b"websocket", b"trailers", b"host", b"x-own", b"upgrade", b"100-continue", b"te"),
    ]
)


@given(
    st.lists(st.tuples(NAMES, FIELD_VALUES), max_size=8),
    st.sampled_from((0, 1)),
    st.sampled_from((None, b"other")),
)
def test_an_independent_reader_understands_what_goes_on(
    given_fields: list[tuple[bytes, bytes]], minor: int, authority: bytes | None
) -> None:
    """What goes on reads, for h11, as a request with the framing that the mesh has found."""
    lines = b"".join(b"%b: %b\r\n" % field for field in given_fields)
    try:
        fields = parse_request_fields(lines, minor, frozenset((b"x-own",)), authority)
    except MeshError:
        return
    reader = h11.Connection(h11.SERVER)
    host = b"" if fields.host is not None else b"Host: own\r\n"
    reader.receive_data(b"POST / HTTP/1.1\r\n" + host + fields.forwarded + b"\r\n")
    event = reader.next_event()
    assert isinstance(event, h11.Request)
    seen = dict(event.headers)
    framing = Framing.NONE
    if b"transfer-encoding" in seen:
        framing = Framing.CHUNKED
    elif int(seen.get(b"content-length", b"0")):
        framing = Framing.LENGTH
    assert framing is fields.framing
    assert seen[b"host"] == (fields.host if fields.host is not None else b"own")
    assert not {b"x-own", b"x_own", b"keep-alive"} & set(seen)
    options = {o.strip() for o in seen.get(b"connection", b"").lower().split(b",")} - {b""}
    assert options == {name for name in (b"te", b"upgrade") if name in seen}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"TRACE / HTTP/1.1", "TRACE request with a body"),
        (b"GET / HTTP/1.0", "GET request with a body in HTTP/1.0"),
        (b"HEAD / HTTP/1.0", "HEAD request with a body in HTTP/1.0"),
        (b"DELETE / HTTP/1.0", "DELETE request with a body in HTTP/1.0"),
        (b"OPTIONS / HTTP/1.0", "OPTIONS request with a body in HTTP/1.0"),
    ],
)
def test_bodies_that_readers_do_not_look_for(line: bytes, said: str) -> None:
    parsed = parse_request_line(line)
    check_body(parsed, parse(HOST))
    with pytest.raises(BadRequest, match=said):
        check_body(parsed, parse(HOST + b"Content-Length: 1\r\n", minor=parsed.minor))


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1", b"DELETE / HTTP/1.1", b"POST / HTTP/1.0"])
def test_bodies_that_may_be(line: bytes) -> None:
    parsed = parse_request_line(line)
    check_body(parsed, parse(HOST + b"Content-Length: 1\r\n", minor=parsed.minor))

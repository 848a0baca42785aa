from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.errors import MeshError, UpstreamProtocolError
from dstack_mesh.wire.framing import Framing
from dstack_mesh.wire.limits import MAX_FIELDS
from dstack_mesh.wire.response import (
    ResponseFields,
    parse_response_fields,
    parse_status_line,
    switches_to,
)


def parse(lines: bytes, minor: int = 1, remove: frozenset[bytes] = frozenset()) -> ResponseFields:
    return parse_response_fields(lines, minor, remove)


@pytest.mark.parametrize(
    ("line", "minor", "status", "rest"),
    [
        (b"HTTP/1.1 200 OK", 1, 200, b"200 OK"),
        (b"HTTP/1.0 404 Not Found", 0, 404, b"404 Not Found"),
        (b"HTTP/1.1 200 ", 1, 200, b"200 "),
        (b"HTTP/1.1 200", 1, 200, b"200 "),
        (b"HTTP/1.1 103 Early Hints", 1, 103, b"103 Early Hints"),
        (b"HTTP/1.1 999 \t caf\xe9 ~", 1, 999, b"999 \t caf\xe9 ~"),
    ],
)
def test_status_lines_rfc9112_4(line: bytes, minor: int, status: int, rest: bytes) -> None:
    parsed = parse_status_line(line)
    assert (parsed.minor, parsed.status, parsed.rest) == (minor, status, rest)


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("empty", b""),
        ("no status", b"HTTP/1.1"),
        ("no status, a space", b"HTTP/1.1 "),
        ("two digits", b"HTTP/1.1 20 OK"),
        ("four digits", b"HTTP/1.1 2000 OK"),
        ("RFC 9110 15: first digit 0", b"HTTP/1.1 099 OK"),
        ("signed", b"HTTP/1.1 +20 OK"),
        ("two spaces before the status", b"HTTP/1.1  200 OK"),
        ("a tab before the reason", b"HTTP/1.1 200\tOK"),
        ("white space first", b" HTTP/1.1 200 OK"),
        ("another version", b"HTTP/2 200 OK"),
        ("HTTP/1.2", b"HTTP/1.2 200 OK"),
        ("case of the name", b"http/1.1 200 OK"),
        ("another protocol", b"ICY 200 OK"),
        ("a bare CR", b"HTTP/1.1 200 O\rK"),
        ("a control byte in the reason", b"HTTP/1.1 200 O\x01K"),
        ("DEL in the reason", b"HTTP/1.1 200 O\x7fK"),
    ],
)
def test_refused_status_lines(rule: str, line: bytes) -> None:
    with pytest.raises(UpstreamProtocolError, match="status line"):
        parse_status_line(line)


@given(st.binary(max_size=40) | st.text("HTP/1.0 29OK\t", max_size=24).map(str.encode))
def test_any_line_is_understood_or_refused(line: bytes) -> None:
    try:
        parsed = parse_status_line(line)
    except MeshError:
        return
    assert 100 <= parsed.status <= 999
    assert parsed.rest.startswith(b"%d " % parsed.status)


def test_end_to_end_fields_go_on_in_their_order_and_spelling() -> None:
    lines = (
        b"Set-Cookie: a=1\r\nX-b: \xe4\r\nset-cookie: b=2\r\nContent-Length: 3\r\nTrailer: X\r\n"
    )
    fields = parse(lines)
    assert fields.forwarded == lines
    assert (fields.declared, fields.length, fields.upgrade) == (Framing.LENGTH, 3, b"")


@pytest.mark.parametrize(
    ("lines", "forwarded"),
    [
        (b"Connection: close\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\n", b""),
        (b"Transfer-Encoding: chunked\r\n", b""),
        (b"Connection: X-Own\r\nX-Own: 1\r\nX-Other: 2\r\n", b"X-Other: 2\r\n"),
        (b"Upgrade: h2, h2c\r\n", b""),
        (b"TE: trailers\r\n", b""),
    ],
)
def test_fields_of_one_connection_rfc9110_7_6_1(lines: bytes, forwarded: bytes) -> None:
    assert parse(lines).forwarded == forwarded


def test_removed_fields_are_handed_over_under_every_spelling() -> None:
    fields = parse(b"X-Own: 1\r\nA: b\r\nx_own: 2\r\n", remove=frozenset((b"x-own",)))
    assert fields.removed == [(b"x-own", b"1"), (b"x_own", b"2")]
    assert fields.forwarded == b"A: b\r\n"


@pytest.mark.parametrize(
    ("lines", "minor", "stays"),
    [
        (b"", 1, True),
        (b"Connection: close\r\n", 1, False),
        (b"", 0, False),
        (b"Connection: keep-alive\r\n", 0, True),
    ],
)
def test_persistence_rfc9112_9_3(lines: bytes, minor: int, stays: bool) -> None:
    assert parse(lines, minor).persists(minor) is stays


@pytest.mark.parametrize(
    ("rule", "lines", "minor"),
    [
        ("RFC 9112 6.1: both lengths", b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", 1),
        ("RFC 9112 6.3: two lengths", b"Content-Length: 1\r\nContent-Length: 1\r\n", 1),
        ("RFC 9112 6.1: in HTTP/1.0", b"Transfer-Encoding: chunked\r\n", 0),
        ("RFC 9112 6.1: another coding", b"Transfer-Encoding: gzip\r\n", 1),
        ("RFC 9110 7.6.1", b"Connection: content-length\r\n", 1),
        ("RFC 9112 5.2: folded", b"A: b\r\n c\r\n", 1),
        ("the limit on fields", b"a: b\r\n" * (MAX_FIELDS + 1), 1),
    ],
)
def test_refused_fields(rule: str, lines: bytes, minor: int) -> None:
    with pytest.raises(UpstreamProtocolError, match=r"^the response has "):
        parse(lines, minor)


def test_an_upgrade_counts_only_with_its_connection_option_rfc9110_7_8() -> None:
    assert parse(b"Upgrade: a\r\nUpgrade: b/1\r\nConnection: Upgrade\r\n").upgrade == b"a, b/1"
    assert parse(b"Upgrade: a\r\n").upgrade == b""


@pytest.mark.parametrize(
    ("offered", "chosen", "fits"),
    [
        (b"WebSocket", b"websocket", True),
        (b"a, b/1", b"b/1", True),
        (b"a, b", b"b, a", True),
        (b"a", b"a, b", False),
        (b"a/1", b"a", False),
        (b"", b"a", False),
        (b"a", b"", False),
        (b"", b"", False),
    ],
)
def test_a_101_names_what_was_offered_rfc9110_7_8(
    offered: bytes, chosen: bytes, fits: bool
) -> None:
    assert switches_to(offered, chosen) is fits

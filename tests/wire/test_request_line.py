"""Request lines: RFC 9112 section 3."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.errors import BadRequest, MeshError, UriTooLong
from dstack_mesh.wire.limits import MAX_REQUEST_TARGET_BYTES
from dstack_mesh.wire.request_line import parse_request_line


@pytest.mark.parametrize(
    ("line", "method", "target", "minor"),
    [
        (b"GET / HTTP/1.1", b"GET", b"/", 1),
        (b"GET / HTTP/1.0", b"GET", b"/", 0),
        (b"get /x HTTP/1.1", b"get", b"/x", 1),
        (b"M-SEARCH /x HTTP/1.1", b"M-SEARCH", b"/x", 1),
        (b"POST /a/../b//c?d=%2f&&e HTTP/1.1", b"POST", b"/a/../b//c?d=%2f&&e", 1),
        (b'GET /"<>\\^`{|} HTTP/1.1', b"GET", b'/"<>\\^`{|}', 1),
        (b"GET //host/path HTTP/1.1", b"GET", b"//host/path", 1),
        (b"OPTIONS * HTTP/1.1", b"OPTIONS", b"*", 1),
        (b"OPTIONS /x HTTP/1.1", b"OPTIONS", b"/x", 1),
    ],
    ids=repr,
)
def test_request_lines(line: bytes, method: bytes, target: bytes, minor: int) -> None:
    parsed = parse_request_line(line)
    assert (parsed.method, parsed.target, parsed.minor, parsed.authority) == (
        method,
        target,
        minor,
        None,
    )


@pytest.mark.parametrize(
    ("line", "target", "authority"),
    [
        (b"GET http://b/c?d HTTP/1.1", b"/c?d", b"b"),
        (b"GET HTTP://b:80/ HTTP/1.0", b"/", b"b:80"),
        (b"GET https://b HTTP/1.1", b"/", b"b"),
        (b"GET http://b?d HTTP/1.1", b"/?d", b"b"),
        (b"GET http://[::1]:8/x HTTP/1.1", b"/x", b"[::1]:8"),
        (b"GET http://b//c HTTP/1.1", b"//c", b"b"),
        (b"OPTIONS http://b HTTP/1.1", b"*", b"b"),
        (b"OPTIONS http://b/ HTTP/1.1", b"/", b"b"),
    ],
    ids=repr,
)
def test_absolute_forms_rfc9112_3_2_2(line: bytes, target: bytes, authority: bytes) -> None:
    parsed = parse_request_line(line)
    assert (parsed.target, parsed.authority) == (target, authority)


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("empty", b""),
        ("3: HTTP/0.9", b"GET /"),
        ("3: two spaces", b"GET  / HTTP/1.1"),
        ("3: a tab", b"GET\t/ HTTP/1.1"),
        ("3: space at the end", b"GET / HTTP/1.1 "),
        ("3: space at the start", b" GET / HTTP/1.1"),
        ("3: space in the target", b"GET /a b HTTP/1.1"),
        ("2.3: another version", b"GET / HTTP/2.0"),
        ("2.3: HTTP/1.2", b"GET / HTTP/1.2"),
        ("2.3: case of the name", b"GET / http/1.1"),
        ("2.3: two digits", b"GET / HTTP/1.10"),
        ("2.3: no dot", b"GET / HTTP/11"),
        ("HTTP/2's preface", b"PRI * HTTP/2.0"),
        ("3.1: method of other than token", b"GE(T / HTTP/1.1"),
        ("3.1: no method", b" / HTTP/1.1"),
        ("3.2: fragment", b"GET /a#b HTTP/1.1"),
        ("3.2: control byte", b"GET /\x01 HTTP/1.1"),
        ("3.2: DEL", b"GET /\x7f HTTP/1.1"),
        ("3.2: other than ASCII", b"GET /\xc3\xa4 HTTP/1.1"),
        ("2.2: bare CR", b"GET /\r HTTP/1.1"),
        ("3.2: no path", b"GET x HTTP/1.1"),
        ("3.2: authority", b"GET a:80 HTTP/1.1"),
        ("3.2.3: CONNECT", b"CONNECT a:80 HTTP/1.1"),
        ("3.2.3: CONNECT with a path", b"CONNECT / HTTP/1.1"),
        ("3.2.4: * with another method", b"GET * HTTP/1.1"),
        ("3.2.2: another scheme", b"GET ftp://a/ HTTP/1.1"),
        ("3.2.2: no host", b"GET http:///x HTTP/1.1"),
        ("3.2.2: user information", b"GET http://u:p@a/ HTTP/1.1"),
        ("3.2.2: a host with a backslash", b"GET http://a\\b/ HTTP/1.1"),
        ("TLS on a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ],
)
def test_refused_request_lines_rfc9112(rule: str, line: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_request_line(line)


def test_the_limit_on_the_target() -> None:
    longest = b"/" * MAX_REQUEST_TARGET_BYTES
    assert parse_request_line(b"GET " + longest + b" HTTP/1.1").target == longest
    with pytest.raises(UriTooLong, match="16384 bytes"):
        parse_request_line(b"GET /" + longest + b" HTTP/1.1")
    with pytest.raises(UriTooLong):
        parse_request_line(b"GET http://a/" + longest + b" HTTP/1.1")
    with pytest.raises(UriTooLong):
        parse_request_line(b"GET /\xff" + longest + b" HTTP/1.1")
    with pytest.raises(UriTooLong):  # as when the line has not come whole: see `Downstream`
        parse_request_line(b"M" * (MAX_REQUEST_TARGET_BYTES + 1024) + b" / HTTP/1.1")


@given(st.binary(max_size=40) | st.text("GET /HTP1.0*:a \t", max_size=24).map(str.encode))
def test_any_line_is_understood_or_refused(line: bytes) -> None:
    try:
        parsed = parse_request_line(line)
    except MeshError:
        return
    assert parsed.target[:1] in (b"/", b"*")
    assert line.startswith(parsed.method + b" ")

from __future__ import annotations

import pytest

from dstack_mesh.wire.fields import MalformedError
from dstack_mesh.wire.framing import (
    Framing,
    connection_options,
    declared_framing,
    persists,
    request_framing,
    response_framing,
)

NONE, LENGTH, CHUNKED, CLOSE = Framing


@pytest.mark.parametrize(
    ("lengths", "codings", "minor", "found"),
    [
        ([], [], 1, (None, 0)),
        ([], [], 0, (None, 0)),
        ([b"0"], [], 1, (LENGTH, 0)),
        ([b"5"], [], 0, (LENGTH, 5)),
        ([b"007"], [], 1, (LENGTH, 7)),
        ([b"9" * 18], [], 1, (LENGTH, 10**18 - 1)),
        ([], [b"chunked"], 1, (CHUNKED, 0)),
        ([], [b"Chunked"], 1, (CHUNKED, 0)),
    ],
)
def test_declared_framings(
    lengths: list[bytes], codings: list[bytes], minor: int, found: tuple[Framing | None, int]
) -> None:
    assert declared_framing(lengths, codings, minor) == found


@pytest.mark.parametrize(
    ("rule", "lengths", "codings", "minor"),
    [
        ("6.1: both lengths", [b"5"], [b"chunked"], 1),
        ("6.1: both lengths, one of them 0", [b"0"], [b"chunked"], 1),
        ("6.1: a coding in HTTP/1.0", [], [b"chunked"], 0),
        ("6.1: another coding", [], [b"gzip"], 1),
        ("6.1: a coding below chunked", [], [b"gzip, chunked"], 1),
        ("6.1: chunked is not the last", [], [b"chunked, gzip"], 1),
        ("7: chunked twice", [], [b"chunked, chunked"], 1),
        ("6.1: chunked in two fields", [], [b"chunked", b"chunked"], 1),
        ("6.1: an empty one too", [], [b"", b"chunked"], 1),
        ("6.1: identity", [], [b"identity"], 1),
        ("6.1: an empty coding", [], [b""], 1),
        ("6.1: with a comma", [], [b"chunked,"], 1),
        ("7: with a parameter", [], [b"chunked;x=1"], 1),
        ("6.1: quoted", [], [b'"chunked"'], 1),
        ("6.1: with a vertical tab", [], [b"\x0bchunked"], 1),
        ("6.3: two lengths", [b"5", b"6"], [], 1),
        ("6.3: the same length twice", [b"5", b"5"], [], 1),
        ("6.3: a list of lengths", [b"5, 5"], [], 1),
        ("6.2: empty", [b""], [], 1),
        ("6.2: signed", [b"+5"], [], 1),
        ("6.2: negative", [b"-5"], [], 1),
        ("6.2: hexadecimal", [b"0x5"], [], 1),
        ("6.2: with an underscore, which Python reads", [b"1_0"], [], 1),
        ("6.2: with a space inside", [b"1 0"], [], 1),
        ("6.2: not ASCII digits", ["٣".encode()], [], 1),
        ("6.2: superscript in Latin-1", [b"\xb2"], [], 1),
        ("6.2: a fraction", [b"5.0"], [], 1),
        ("9.6: longer than any reader counts", [b"9" * 19], [], 1),
        ("9.6: zeros without end", [b"0" * 19], [], 1),
    ],
)
def test_refused_framings_rfc9112(
    rule: str, lengths: list[bytes], codings: list[bytes], minor: int
) -> None:
    with pytest.raises(MalformedError):
        declared_framing(lengths, codings, minor)


@pytest.mark.parametrize(
    ("declared", "length", "framing"),
    [(None, 0, NONE), (LENGTH, 0, NONE), (LENGTH, 1, LENGTH), (CHUNKED, 0, CHUNKED)],
)
def test_a_requests_framing_rfc9112_6_3(
    declared: Framing | None, length: int, framing: Framing
) -> None:
    assert request_framing(declared, length) is framing


@pytest.mark.parametrize(
    ("rule", "method", "status", "declared", "length", "framing"),
    [
        ("1: HEAD with a length", b"HEAD", 200, LENGTH, 5, NONE),
        ("1: HEAD with a coding", b"HEAD", 200, CHUNKED, 0, NONE),
        ("1: HEAD with nothing", b"HEAD", 200, None, 0, NONE),
        ("1: head is another method", b"head", 200, LENGTH, 5, LENGTH),
        ("1: 304 with the length of the 200", b"GET", 304, LENGTH, 5, NONE),
        ("1: 304 with a coding", b"GET", 304, CHUNKED, 0, NONE),
        ("1: 204", b"GET", 204, None, 0, NONE),
        ("1: 204 with a length of 0", b"GET", 204, LENGTH, 0, NONE),
        ("1: interim", b"GET", 103, None, 0, NONE),
        ("1: 101", b"GET", 101, LENGTH, 0, NONE),
        ("4: coding", b"GET", 200, CHUNKED, 0, CHUNKED),
        ("6: length", b"GET", 200, LENGTH, 5, LENGTH),
        ("6: length 0", b"GET", 200, LENGTH, 0, NONE),
        ("8: neither", b"GET", 200, None, 0, CLOSE),
        ("8: neither, with an error", b"POST", 500, None, 0, CLOSE),
        ("RFC 9110 15.3.6: 205 without a body", b"GET", 205, LENGTH, 0, NONE),
    ],
)
def test_a_responses_framing_rfc9112_6_3(
    rule: str, method: bytes, status: int, declared: Framing | None, length: int, framing: Framing
) -> None:
    assert response_framing(method, status, declared, length) is framing


@pytest.mark.parametrize("status", [100, 101, 103, 199, 204])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize(("declared", "length"), [(LENGTH, 5), (CHUNKED, 0)])
def test_a_body_where_there_can_be_none_rfc9110_8_6(
    status: int, method: bytes, declared: Framing, length: int
) -> None:
    with pytest.raises(MalformedError, match=f"a {status} response"):
        response_framing(method, status, declared, length)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([], set()),
        ([b"close"], {b"close"}),
        ([b"Keep-Alive, X-Own", b"TE"], {b"keep-alive", b"x-own", b"te"}),
        ([b",, ,"], set()),
    ],
)
def test_connection_options_rfc9110_7_6_1(values: list[bytes], options: set[bytes]) -> None:
    assert connection_options(values) == options


@pytest.mark.parametrize("value", [b"host", b"close, Host", b"Content-Length", b"x,CONTENT-LENGTH"])
def test_options_that_would_change_the_messages_meaning(value: bytes) -> None:
    with pytest.raises(MalformedError, match="Connection lists"):
        connection_options([value])


@pytest.mark.parametrize(
    ("minor", "options", "stays"),
    [
        (1, (), True),
        (1, (b"keep-alive",), True),
        (1, (b"close",), False),
        (1, (b"close", b"keep-alive"), False),
        (0, (), False),
        (0, (b"keep-alive",), True),
        (0, (b"close", b"keep-alive"), False),
    ],
)
def test_persistence_rfc9112_9_3(minor: int, options: tuple[bytes, ...], stays: bool) -> None:
    assert persists(minor, frozenset(options)) is stays


@pytest.mark.parametrize(("declared", "length"), [(None, 0), (LENGTH, 5), (CHUNKED, 0)])
def test_a_205_that_may_have_a_body_rfc9110_15_3_6(declared: Framing | None, length: int) -> None:
    with pytest.raises(MalformedError, match="a 205 response"):
        response_framing(b"GET", 205, declared, length)

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.errors import UpstreamProtocolError
from dstack_mesh.wire.fields import MalformedError
from dstack_mesh.wire.limits import MAX_HEAD_BYTES, MAX_INTERIM_RESPONSES
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.translate import RequestBody, Response, ResponseRules, behind_body

RULES = ResponseRules(remote_errors=False)
REMOVE = frozenset((b"x-own",))
CUTS = st.lists(st.integers(0, 600), max_size=10)


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(i % (len(data) + 1) for i in at), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# Requests' bodies.


@pytest.mark.parametrize(
    ("lines", "data", "beyond"),
    [
        (b"Content-Length: 2\r\n", b"ab", b""),
        (b"Content-Length: 2\r\n", b"abGET", b"GET"),
        (b"Content-Length: 2\r\n", b"a", None),
        (b"Transfer-Encoding: chunked\r\n", b"1\r\na\r\n0\r\n\r\nGET", b"GET"),
        (b"Transfer-Encoding: chunked\r\n", b"1\r\na\r\n0\r\n", None),
        (b"Transfer-Encoding: chunked\r\n", b"nonsense\r\n", None),
    ],
)
def test_what_is_behind_a_whole_body(lines: bytes, data: bytes, beyond: bytes | None) -> None:
    fields = parse_request_fields(b"Host: a\r\n" + lines, 1, REMOVE)
    assert behind_body(fields, data) == beyond


def request_body(lines: bytes) -> RequestBody:
    fields = parse_request_fields(b"Host: a\r\n" + lines, 1, REMOVE)
    return RequestBody(fields, REMOVE)


def send(body: RequestBody, pieces: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Feed the pieces; give what goes on and what is left of them."""
    out, rest = b"", b""
    for piece in pieces:
        if body.done:
            rest += piece
            continue
        more, taken = body.feed(piece)
        out += more
        rest += piece[taken:]
    return out, rest


def test_a_body_by_length_goes_on_as_it_came() -> None:
    body = request_body(b"Content-Length: 5\r\n")
    assert send(body, [b"ab", b"cde", b"next"]) == (b"abcde", b"next")
    assert body.done


def test_a_chunked_body_is_chunked_anew() -> None:
    body = request_body(b"Transfer-Encoding: chunked\r\n")
    data = b"1;ext=1\r\na\r\n002\r\nbc\r\n0\r\nX-Sum: 1\r\nx_own: 2\r\nHost: evil\r\n\r\nnext"
    assert send(body, [data]) == (b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n", b"next")
    assert body.done


def test_a_part_of_a_chunk_goes_on_at_once() -> None:
    body = request_body(b"Transfer-Encoding: chunked\r\n")
    assert body.feed(b"5\r\n") == (b"", 3)
    assert body.feed(b"ab") == (b"2\r\nab\r\n", 2)
    assert body.feed(b"cde\r") == (b"3\r\ncde\r\n", 4)
    assert body.feed(b"\n0\r\n\r\n") == (b"0\r\n\r\n", 6)


def test_what_breaks_the_framing_is_refused() -> None:
    with pytest.raises(MalformedError):
        request_body(b"Transfer-Encoding: chunked\r\n").feed(b"x\r\n")


@given(
    st.lists(st.binary(min_size=1, max_size=30), max_size=5),
    st.sampled_from([b"", b"X-Sum: 1\r\n", b"x-own: 1\r\nTrailer: a\r\nB: c\r\n"]),
    CUTS,
)
def test_any_split_of_a_chunked_request_reads_back_as_what_was_meant(
    payloads: list[bytes], trailers: bytes, where: list[int]
) -> None:
    body = request_body(b"Transfer-Encoding: chunked\r\n")
    data = b"".join(b"%X;e\r\n%b\r\n" % (len(p), p) for p in payloads)
    out, rest = send(body, cut(data + b"0\r\n" + trailers + b"\r\n" + b"GET", where))
    assert (body.done, rest) == (True, b"GET")
    reader = h11.Connection(h11.SERVER)
    head = parse_request_fields(
        b"Host: a\r\nTransfer-Encoding: chunked\r\n", 1, frozenset()
    ).forwarded
    reader.receive_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n" + out)
    assert isinstance(reader.next_event(), h11.Request)
    seen = b""
    while isinstance(event := reader.next_event(), h11.Data):
        seen += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert seen == b"".join(payloads)
    assert reader.trailing_data == (b"", False)
    allowed = {b"x-sum": b"1"} if b"X-Sum" in trailers else {b"b": b"c"} if trailers else {}
    assert dict(event.headers) == allowed


# Responses.


def response(
    method: bytes = b"GET",
    minor: int = 1,
    offered: bytes = b"",
    *,
    keep: bool = True,
    rules: ResponseRules = RULES,
) -> Response:
    made = Response(method, minor, offered, rules)
    made.keep_client = keep
    return made


def receive(one: Response, pieces: Iterable[bytes]) -> bytes:
    """Feed the pieces, up to the response's end."""
    out = b""
    for piece in pieces:
        if not one.done and piece:
            out += one.feed(piece)
    return out


@dataclass
class Case:
    """A response from upstream, and what is to become of it."""

    name: str
    data: bytes
    out: bytes
    method: bytes = b"GET"
    minor: int = 1
    keep: bool = True
    done: bool = True
    keep_client: bool = True
    keep_upstream: bool = True
    status: int = 200
    tail: bytes | None = field(default=None)
    """What an orderly end of the connection adds; None where it ends the response too early."""


CASES = [
    Case(
        "a body by length",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    ),
    Case(
        "a body by length to an HTTP/1.0 client that keeps its connection",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\nabc",
        minor=0,
    ),
    Case(
        "a body by length to a client that closes",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
        keep=False,
        keep_client=False,
    ),
    Case(
        "a length of 0",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        status=404,
    ),
    Case(
        "a body by length that is not all there",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
        done=False,
    ),
    Case(
        "bytes behind a body by length",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        keep_upstream=False,
    ),
    Case(
        "the server closes",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        keep_upstream=False,
    ),
    Case(
        "an HTTP/1.0 server",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        keep_upstream=False,
    ),
    Case(
        "an HTTP/1.0 server that keeps its connection",
        b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    ),
    Case(
        "chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1;x\r\na\r\n2\r\nbc\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n",
    ),
    Case(
        "chunked to an HTTP/1.0 client",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc",
        minor=0,
        keep_client=False,
    ),
    Case(
        "chunked and not all there",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        done=False,
    ),
    Case(
        "bytes behind a chunked body",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        keep_upstream=False,
    ),
    Case(
        "to the connection's end",
        b"HTTP/1.1 200 OK\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        done=False,
        keep_upstream=False,
        tail=b"0\r\n\r\n",
    ),
    Case(
        "to the connection's end and empty",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        done=False,
        keep_upstream=False,
        tail=b"0\r\n\r\n",
    ),
    Case(
        "to the connection's end, to an HTTP/1.0 client",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc",
        minor=0,
        done=False,
        keep_client=False,
        keep_upstream=False,
        tail=b"",
    ),
    Case(
        "to HEAD, with the length that GET would have",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
        method=b"HEAD",
    ),
    Case(
        "to HEAD, with the coding that GET would have",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        method=b"HEAD",
    ),
    Case(
        "to HEAD of an HTTP/1.0 client, with a coding",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n",
        method=b"HEAD",
        minor=0,
    ),
    Case(
        "to HEAD, with no framing",
        b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n",
        method=b"HEAD",
    ),
    Case(
        "to HEAD, with a body all the same",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
        method=b"HEAD",
        keep_upstream=False,
    ),
    Case("204", b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n", status=204),
    Case(
        "RFC 9110 8.6: 204 and 1xx pass without a length, be it 0",
        b"HTTP/1.1 103 Early\r\ncontent-length: 0\r\nLink: a\r\n\r\n"
        b"HTTP/1.1 204 No\r\nA: b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 204 No\r\nA: b\r\n\r\n",
        status=204,
    ),
    Case(
        "204 with a body all the same",
        b"HTTP/1.1 204 No\r\n\r\nabc",
        b"HTTP/1.1 204 No\r\n\r\n",
        status=204,
        keep_upstream=False,
    ),
    Case(
        "304 with the length of the 200",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\nETag: x\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\nETag: x\r\n\r\n",
        status=304,
    ),
    Case(
        "interim responses",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: a\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: a\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ),
    Case(
        "interim responses to an HTTP/1.0 client",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n",
        minor=0,
    ),
    Case(
        "an interim response that says close does not close",
        b"HTTP/1.1 100 C\r\nConnection: close\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ),
    Case(
        "no reason",
        b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n",
    ),
    Case(
        "an upgrade that is only offered",
        b"HTTP/1.1 426 Upgrade\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 426 Upgrade\r\nContent-Length: 0\r\n\r\n",
        status=426,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_responses(case: Case) -> None:
    one = response(case.method, case.minor, keep=case.keep)
    assert receive(one, [case.data]) == case.out
    assert (one.done, one.status, one.touched) == (case.done, case.status, True)
    if one.done or case.tail is not None:
        assert one.keep_upstream is case.keep_upstream
    assert one.keep_client is case.keep_client
    if not case.done:
        assert one.end(clean=True) == case.tail
        assert one.done is (case.tail is not None)


Lines = list[tuple[bytes, bytes]]


@dataclass
class Seen:
    """What a client's reader understood."""

    heads: list[tuple[int, Lines]]
    payload: bytes
    trailers: Lines | None
    """None while the response has not ended."""
    rest: bytes


def read(out: bytes, method: bytes) -> Seen:
    """Read what a client got with h11, an independent strict reader."""
    reader = h11.Connection(h11.CLIENT)
    reader.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
    reader.send(h11.EndOfMessage())
    reader.receive_data(out)
    seen = Seen([], b"", None, b"")
    while seen.trailers is None and (event := reader.next_event()) is not h11.NEED_DATA:
        if isinstance(event, h11.Data):
            seen.payload += event.data
        elif isinstance(event, h11.InformationalResponse | h11.Response):
            seen.heads.append((event.status_code, list(event.headers)))
        else:
            assert isinstance(event, h11.EndOfMessage)
            seen.trailers = list(event.headers)
    seen.rest = reader.trailing_data[0]
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_split_of_a_response_gives_the_same(case: Case) -> None:
    whole = read(receive(response(case.method, case.minor), [case.data]), case.method)
    splits = [bytewise(case.data), *(cut(case.data, [at]) for at in range(len(case.data)))]
    for pieces in splits:
        one = response(case.method, case.minor)
        out = receive(one, pieces)
        assert read(out, case.method) == whole
        assert (one.done, one.status) == (case.done, case.status)
        assert whole.rest == b""


@given(
    st.lists(st.binary(min_size=1, max_size=30), max_size=5),
    st.sampled_from(["length", "chunked", "close"]),
    st.sampled_from([0, 1]),
    st.integers(0, 3),
    CUTS,
)
def test_any_response_reads_back_as_what_was_meant(
    payloads: list[bytes], framing: str, minor: int, interims: int, where: list[int]
) -> None:
    body = b"".join(payloads)
    head = b"HTTP/1.1 100 Continue\r\n\r\n" * interims + b"HTTP/1.1 200 OK\r\nX: \xff\r\n"
    if framing == "length":
        data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    elif framing == "chunked":
        data = head + b"Transfer-Encoding: chunked\r\n\r\n"
        data += b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in payloads) + b"0\r\nT: 1\r\n\r\n"
    else:
        data = head + b"\r\n" + body
    one = response(minor=minor)
    out = receive(one, cut(data, where))
    if framing == "close":
        tail = one.end(clean=True)
        assert tail is not None
        out += tail
    assert one.done
    assert one.keep_client is (minor == 1 or framing == "length")
    if minor == 0:  # h11 has no HTTP/1.0 client: neither interim responses nor chunks are there
        assert out.startswith(b"HTTP/1.1 200 OK\r\n")
        assert out.endswith(b"\r\n\r\n" + body)
        return
    seen = read(out, b"GET")
    *interim, (status, headers) = seen.heads
    assert interim == [(100, [])] * interims
    assert (status, seen.payload, seen.rest) == (200, body, b"")
    assert (b"x", b"\xff") in headers
    assert seen.trailers == ([(b"t", b"1")] if framing == "chunked" else [])


@pytest.mark.parametrize(
    ("rule", "data"),
    [
        ("not HTTP", b"SSH-2.0-OpenSSH\r\n"),
        ("not HTTP, from the first byte", b"\x15\x03"),
        ("an empty line first", b"\r\nHTTP/1.1 200 OK\r\n\r\n"),
        ("HTTP/2", b"HTTP/2 200\r\n\r\n"),
        ("bare LF", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
        ("a bare LF before the end", b"HTTP/1.1 200 OK\nX: y\r\n"),
        (
            "RFC 9112 6.1: both lengths",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        ("RFC 9110 8.6: 204 with a body", b"HTTP/1.1 204 No\r\nContent-Length: 1\r\n\r\nx"),
        (
            "RFC 9112 6.1: 204 with a coding",
            b"HTTP/1.1 204 No\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        ("RFC 9110 8.6: 1xx with a body", b"HTTP/1.1 100 C\r\nContent-Length: 1\r\n\r\nx"),
        ("a malformed chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"),
        (
            "RFC 9110 7.8: 101 unasked",
            b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n",
        ),
        ("behind an interim response", b"HTTP/1.1 100 C\r\n\r\nnonsense\r\n"),
    ],
)
def test_refused_responses(rule: str, data: bytes) -> None:
    for pieces in ([data], bytewise(data)):
        with pytest.raises(UpstreamProtocolError):
            receive(response(), pieces)


def test_the_number_of_interim_responses_is_limited() -> None:
    interim = b"HTTP/1.1 102 Processing\r\n\r\n"
    for minor in (0, 1):
        one = response(minor=minor)
        out = receive(one, [interim * MAX_INTERIM_RESPONSES])
        assert out == interim * MAX_INTERIM_RESPONSES * minor
        with pytest.raises(UpstreamProtocolError, match="more than 16 interim"):
            one.feed(interim)


def test_a_short_head_behind_a_long_interim_one_is_found() -> None:
    interim = b"HTTP/1.1 103 Early\r\nLink: " + b"x" * 500 + b"\r\n\r\n"
    final = b"HTTP/1.1 204 No\r\n\r\n"
    one = response()
    assert receive(one, [interim[:-2], interim[-2:] + final]) == interim + final
    assert one.done


def head_of(size: int) -> bytes:
    """Make a response head of `size` bytes, its blank line included."""
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: "
    return start + b"x" * (size - len(start) - 4) + b"\r\n\r\n"


def test_the_limit_on_a_response_head() -> None:
    for cuts in ([], [5], [MAX_HEAD_BYTES - 2]):
        one = response()
        receive(one, cut(head_of(MAX_HEAD_BYTES), cuts))
        assert one.done
        with pytest.raises(UpstreamProtocolError, match="head is over"):
            receive(response(), cut(head_of(MAX_HEAD_BYTES + 1), cuts))
    with pytest.raises(UpstreamProtocolError, match="head is over"):
        receive(response(), [b"HTTP/1.1 200 OK\r\nX: ", *[b"x" * 1000] * 70])


def test_a_body_does_not_count_as_head() -> None:
    body = b"x" * 200_000
    out = receive(response(), [b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + body])
    assert out.endswith(body)


# The end of the connection.


@pytest.mark.parametrize("case", [c for c in CASES if not c.done], ids=lambda case: case.name)
def test_an_unorderly_end_breaks_every_response_off(case: Case) -> None:
    one = response(case.method, case.minor)
    receive(one, [case.data])
    assert one.end(clean=False) is None
    assert not one.done


@pytest.mark.parametrize(
    "data",
    [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nX", b"HTTP/1.1 100 C\r\n\r\n"],
    ids=["nothing", "part of a line", "part of a head", "interim"],
)
def test_an_end_before_the_head_is_no_end(data: bytes) -> None:
    one = response()
    receive(one, [data])
    assert one.end(clean=True) is None
    assert (one.status, one.touched) == (0, bool(data))


def test_a_body_cut_short_by_an_orderly_end_is_not_whole() -> None:
    """RFC 9112 section 8: a length or a last chunk that is missing makes a message incomplete."""
    for head in (
        b"Content-Length: 4\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ):
        for minor in (0, 1):
            one = response(minor=minor)
            receive(one, [b"HTTP/1.1 200 OK\r\n" + head])
            assert one.end(clean=True) is None
            assert not one.done


# Changing the protocol: RFC 9110 section 7.8.

SWITCH = b"HTTP/1.1 101 Go\r\nUpgrade: WebSocket\r\nX: y\r\nConnection: Upgrade\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Go\r\nX: y\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n"


@pytest.mark.parametrize("behind", [b"", b"\x81\x02hi", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_what_comes_behind_a_101_belongs_to_the_new_protocol(behind: bytes) -> None:
    one = response(offered=b"foo, websocket")
    assert receive(one, [SWITCH + behind]) == SWITCHED + behind
    assert (one.status, one.switched, one.done) == (101, True, False)
    assert one.end(clean=True) is None


def test_a_101_may_follow_a_100_rfc9110_7_8() -> None:
    one = response(offered=b"websocket")
    interim = b"HTTP/1.1 100 C\r\n\r\n"
    assert receive(one, [interim, SWITCH]) == interim + SWITCHED


@pytest.mark.parametrize(
    "lines",
    [
        b"Upgrade: websocket\r\n",
        b"Connection: upgrade\r\n",
        b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket, h2c\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_refused_changes_of_the_protocol(lines: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        response(offered=b"websocket").feed(b"HTTP/1.1 101 S\r\n" + lines + b"\r\n")


def test_http_1_0_changes_no_protocol() -> None:
    with pytest.raises(UpstreamProtocolError, match=r"in HTTP/1\.0"):
        response(offered=b"websocket").feed(SWITCH.replace(b"1.1", b"1.0"))


@pytest.mark.parametrize("length", [0, 2])
def test_a_connection_with_bytes_behind_a_whole_response_is_not_kept(length: int) -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (length, b"x" * length)
    for behind in (b"", b"y"):
        one = response()
        assert one.feed(whole + behind) == whole
        assert (one.done, one.keep_upstream) == (True, not behind)


# Another mesh's error header.

MARKED = b"HTTP/1.%d 502 Bad\r\nContent-Length: 0\r\nX-Dstack-Mesh-Error: connect_failed\r\n\r\n"


@pytest.mark.parametrize("minor", [0, 1])
def test_a_remote_meshs_error_is_marked_once(minor: int) -> None:
    rules = ResponseRules(remote_errors=True)
    for _ in range(3):  # the second and third come from the memo
        out = receive(response(rules=rules), [MARKED % minor])
        assert out == (
            b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n"
            b"x-dstack-mesh-error: connect_failed; remote\r\n\r\n"
        )


@pytest.mark.parametrize("minor", [0, 1])
@pytest.mark.parametrize("name", [b"X-Dstack-Mesh-Error", b"x_dstack_mesh-error"])
def test_a_backend_cannot_speak_for_the_mesh(name: bytes, minor: int) -> None:
    data = (MARKED % minor).replace(b"X-Dstack-Mesh-Error", name)
    for remote, out in ((False, b""), (True, b"; remote\r\n")):
        rules = ResponseRules(remote_errors=remote)
        got = receive(response(rules=rules), [data])
        assert name not in got
        assert (b"x-dstack-mesh-error" in got) is (bool(out) and b"_" not in name)


def test_trailers_cannot_speak_for_the_mesh() -> None:
    data = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx_dstack-mesh_error: a\r\n\r\n"
    )
    for remote in (False, True):
        rules = ResponseRules(remote_errors=remote)
        assert receive(response(rules=rules), [data]).endswith(b"\r\n\r\n0\r\n\r\n")


def test_remembered_fields_do_not_depend_on_the_request() -> None:
    """The same block answers GET, HEAD, HTTP/1.0 and closing clients, each in its way."""
    rules = ResponseRules(remote_errors=True)
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    for _ in range(2):
        for method, minor, keep, own in (
            (b"GET", 1, True, b""),
            (b"HEAD", 1, True, b""),
            (b"GET", 0, True, b"Connection: keep-alive\r\n"),
            (b"GET", 1, False, b"Connection: close\r\n"),
        ):
            one = response(method, minor, keep=keep, rules=rules)
            assert receive(one, [data]) == data[:-2] + own + b"\r\n"
            assert one.done is (method == b"HEAD")


def test_http_1_0_and_1_1_fields_are_not_mixed_up() -> None:
    """`Transfer-Encoding` means nothing in HTTP/1.0, even where 1.1 has been seen with it."""
    rules = ResponseRules(remote_errors=False)
    lines = b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    receive(response(rules=rules), [b"HTTP/1.1 " + lines])
    with pytest.raises(UpstreamProtocolError):
        receive(response(rules=rules), [b"HTTP/1.0 " + lines])

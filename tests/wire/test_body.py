from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.wire.body import (
    ChunkedDecoder,
    CloseDecoder,
    Decoder,
    LengthDecoder,
    chunk,
    decoder,
    last_chunk,
)
from dstack_mesh.wire.fields import MalformedError, TooLargeError
from dstack_mesh.wire.framing import Framing
from dstack_mesh.wire.limits import MAX_CHUNK_LINE_BYTES, MAX_FIELDS, MAX_HEAD_BYTES

REMOVE = frozenset((b"x-own",))


def chunked() -> ChunkedDecoder:
    return ChunkedDecoder(REMOVE)


def run(body: Decoder, pieces: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Feed the pieces as the relay does; give the payload and what is left of them."""
    payload, rest = b"", b""
    for piece in pieces:
        if body.done:
            rest += piece
            continue
        found, taken = body.feed(piece)
        assert body.done or taken == len(piece)
        payload += found
        rest += piece[taken:]
    return payload, rest


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(i % (len(data) + 1) for i in at), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


# By length, and to the end.


def test_a_body_by_length_takes_its_bytes_and_no_more() -> None:
    body = LengthDecoder(5)
    assert body.feed(b"abc") == (b"abc", 3)
    assert not body.done
    assert body.feed(b"defg") == (b"de", 2)
    assert (body.done, body.trailers) == (True, b"")
    assert body.feed(b"more") == (b"", 0)


def test_a_body_by_length_that_ends_with_a_read_is_not_copied() -> None:
    data = b"abcde"
    payload, taken = LengthDecoder(5).feed(data)
    assert (payload is data, taken) == (True, 5)


def test_a_body_of_no_length_is_done() -> None:
    assert LengthDecoder(0).done


def test_a_body_to_the_connections_end_is_never_done_by_what_was_read() -> None:
    body = CloseDecoder()
    assert body.feed(b"abc") == (b"abc", 3)
    assert (body.done, body.trailers) == (False, b"")


def test_the_decoder_of_each_framing() -> None:
    assert isinstance(decoder(Framing.LENGTH, 1, REMOVE), LengthDecoder)
    assert isinstance(decoder(Framing.CHUNKED, 0, REMOVE), ChunkedDecoder)
    assert isinstance(decoder(Framing.CLOSE, 0, REMOVE), CloseDecoder)


# Chunked: RFC 9112 section 7.1.


@pytest.mark.parametrize(
    ("data", "payload", "trailers"),
    [
        (b"0\r\n\r\n", b"", b""),
        (b"00000\r\n\r\n", b"", b""),
        (b"3\r\nabc\r\n0\r\n\r\n", b"abc", b""),
        (b"3\r\nabc\r\n2\r\n\r\n\r\n0\r\n\r\n", b"abc\r\n", b""),
        (b"A\r\n0123456789\r\n00a\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2, b""),
        (b'1;a\r\nx\r\n1 ; a=b;c="d;e"\r\ny\r\n1\t;\xff\r\nz\r\n0;last\r\n\r\n', b"xyz", b""),
        (b"1;\r\nx\r\n0\r\n\r\n", b"x", b""),
        (b"0\r\nX-Sum: 1\r\nA:  b \r\n\r\n", b"", b"X-Sum: 1\r\nA: b\r\n"),
        (b"0\r\nHost: a\r\nX_Own: 1\r\nB: c\r\n\r\n", b"", b"B: c\r\n"),
    ],
    ids=repr,
)
def test_chunked_bodies(data: bytes, payload: bytes, trailers: bytes) -> None:
    next_message = b"GET / HTTP/1.1\r\n\r\n"
    for pieces in ([data + next_message], bytewise(data + next_message)):
        body = chunked()
        assert run(body, pieces) == (payload, next_message)
        assert (body.done, body.trailers) == (True, trailers)


@pytest.mark.parametrize(
    ("rule", "data"),
    [
        ("no size", b"\r\nabc"),
        ("not hexadecimal", b"g\r\n"),
        ("as Python writes it", b"0x3\r\nabc\r\n"),
        ("an underscore, which Python reads", b"1_0\r\n"),
        ("signed", b"+3\r\nabc\r\n"),
        ("negative", b"-3\r\nabc\r\n"),
        ("white space first", b" 3\r\nabc\r\n"),
        ("white space behind, without an extension", b"3 \r\nabc\r\n"),
        ("LF for CRLF", b"3\nabc\r\n"),
        ("CR CR LF", b"3\r\r\nabc\r\n"),
        ("a bare CR in an extension", b"3;a\rb\r\nabc\r\n"),
        ("a control byte in an extension", b"3;\x01\r\nabc\r\n"),
        ("DEL in an extension", b"3;\x7f\r\nabc\r\n"),
        ("longer than its size", b"3\r\nabcd\r\n0\r\n\r\n"),
        ("LF behind the data", b"3\r\nabc\n0\r\n\r\n"),
        ("CR and another byte behind the data", b"3\r\nabc\rX0\r\n\r\n"),
        ("CRLF within CRLF behind the data", b"3\r\nabc\r\r\n0\r\n\r\n"),
        ("17 digits", b"0" * 16 + b"3\r\nabc\r\n"),
        ("2**64", b"1" + b"0" * 16 + b"\r\n"),
        ("trailers folded", b"0\r\nA: b\r\n c\r\n\r\n"),
        ("trailers with a bare LF", b"0\r\nA: b\nC: d\r\n\r\n"),
        ("trailers with a space before the colon", b"0\r\nA : b\r\n\r\n"),
        ("a request in the place of the trailers", b"0\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    ],
)
def test_refused_chunked_bodies(rule: str, data: bytes) -> None:
    for pieces in ([data], bytewise(data)):
        with pytest.raises(MalformedError):
            run(chunked(), pieces)


@pytest.mark.parametrize("end", [b"\r\nabc\r\n", b";x\r\nabc\r\n"])
def test_a_size_of_16_digits_fits(end: bytes) -> None:
    assert run(chunked(), [b"0" * 15 + b"3" + end])[0] == b"abc"


def test_the_largest_chunk_is_taken_as_it_comes() -> None:
    body = chunked()
    assert run(body, [b"7" + b"f" * 15 + b"\r\nabc"])[0] == b"abc"
    assert body._remaining == 2**63 - 4


def test_a_chunk_that_some_reader_cannot_count() -> None:
    with pytest.raises(TooLargeError, match=r"2\^63"):
        run(chunked(), [b"8" + b"0" * 15 + b"\r\nabc"])


@pytest.mark.parametrize(
    "line", [b'5;x="', b'5;x="\\"', b'5;x="a";y="', b'5;x="a\\"', b'5;"', b"5;x=\x7f"]
)
def test_quotes_that_do_not_close_in_a_chunks_extension(line: bytes) -> None:
    with pytest.raises(MalformedError, match="chunk line"):
        run(chunked(), [line + b"\r\nhello\r\n0\r\n\r\n"])


@pytest.mark.parametrize("line", [b'5;x="a"', b'5 ; x = "a;\\"b" ;y', b"5;;", b'5;a"b"c'])
def test_extensions_that_are_read_over(line: bytes) -> None:
    assert run(chunked(), [line + b"\r\nhello\r\n0\r\n\r\n"])[0] == b"hello"


@pytest.mark.parametrize("trailers", [b"\n", b"X: 1\n\r", b"X: 1\n\n", b"X: 1\nY"])
def test_a_bare_lf_in_trailers_is_told_at_once(trailers: bytes) -> None:
    with pytest.raises(MalformedError, match="bare LF"):
        run(chunked(), [b"0\r\n" + trailers])


@pytest.mark.parametrize("pieces", ["whole", "bytes", "before the CR", "before the LF"])
def test_the_limit_on_a_chunks_line(pieces: str) -> None:
    def split(data: bytes) -> list[bytes]:
        where = {
            "whole": [],
            "before the CR": [data.find(b"\r")],
            "before the LF": [data.find(b"\n")],
        }
        return bytewise(data) if pieces == "bytes" else cut(data, where[pieces])

    longest = b"3;" + b"x" * (MAX_CHUNK_LINE_BYTES - 2)
    assert run(chunked(), split(longest + b"\r\nabc\r\n0\r\n\r\n")) == (b"abc", b"")
    with pytest.raises(MalformedError):
        run(chunked(), split(longest + b"x\r\nabc\r\n0\r\n\r\n"))


def test_a_chunk_line_without_an_end_is_refused_before_it_ends() -> None:
    with pytest.raises(TooLargeError):
        run(chunked(), [b"3;", b"x" * 2000])


def trailers_of(size: int) -> bytes:
    """Make a trailer section of `size` bytes, its blank line included."""
    return b"A: " + b"x" * (size - 7) + b"\r\n\r\n"


def test_the_limit_on_trailers() -> None:
    body = chunked()
    run(body, [b"0\r\n", trailers_of(MAX_HEAD_BYTES)])
    assert len(body.trailers) == MAX_HEAD_BYTES - 2
    with pytest.raises(TooLargeError, match="trailers of over"):
        run(chunked(), [b"0\r\n", trailers_of(MAX_HEAD_BYTES + 1)])
    with pytest.raises(TooLargeError, match="trailers of over"):
        run(chunked(), [b"0\r\nA: ", *[b"x" * 1000] * 70])
    run(chunked(), [b"0\r\n" + b"a:\r\n" * MAX_FIELDS + b"\r\n"])
    with pytest.raises(TooLargeError, match="field lines"):
        run(chunked(), [b"0\r\n" + b"a:\r\n" * (MAX_FIELDS + 1) + b"\r\n"])


def test_bytes_behind_the_trailers_do_not_count_as_trailers() -> None:
    body = chunked()
    _, rest = run(body, [b"0\r\nA: b\r\n\r\n" + b"x" * MAX_HEAD_BYTES])
    assert (body.done, len(rest)) == (True, MAX_HEAD_BYTES)


@pytest.mark.parametrize("size", [100, MAX_HEAD_BYTES - 10])
def test_trailers_may_come_in_pieces(size: int) -> None:
    data = b"0\r\n" + trailers_of(size)
    for where in range(len(data) - 5, len(data) + 1):
        body = chunked()
        assert run(body, [*cut(data, [where]), b"next"]) == (b"", b"next")
        assert body.done


SMALL = st.binary(max_size=20)
TRAILERS = st.sampled_from([b"", b"X: 1\r\n", b"A: b\r\nX-Own: c\r\nD: e\r\n"])
EXTENSIONS = st.sampled_from([b"", b";a=b", b" ;\tx", b";" + b"y" * 30])
CUTS = st.lists(st.integers(0, 400), max_size=12)


@given(st.lists(st.tuples(SMALL, EXTENSIONS), max_size=6), TRAILERS, CUTS, SMALL)
def test_any_split_of_a_chunked_body_gives_the_same(
    chunks: list[tuple[bytes, bytes]], trailers: bytes, where: list[int], behind: bytes
) -> None:
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(p), e, p) for p, e in chunks if p)
    data += b"0\r\n" + trailers + b"\r\n" + behind
    body = chunked()
    assert run(body, cut(data, where)) == (b"".join(p for p, _ in chunks), behind)
    assert body.done
    assert body.trailers == trailers.replace(b"X-Own: c\r\n", b"")


@given(st.text("0123aF;x \t\r\n:", max_size=40).map(str.encode) | st.binary(max_size=40), CUTS)
def test_any_bytes_end_alike_however_they_are_split(data: bytes, where: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> tuple[bytes, bytes, bool, bytes] | None:
        body = chunked()
        try:
            payload, rest = run(body, pieces)
        except MalformedError:
            return None
        return payload, rest, body.done, body.trailers

    # Bytes that break the framing may be told earlier in one split than in another, so what comes
    # behind them is long enough for all of them to be told.
    data += b"\r\n" * 3
    whole = outcome([data])
    parts = outcome(cut(data, where))
    single = outcome(bytewise(data))
    assert whole == parts == single


@given(st.lists(st.binary(max_size=40), max_size=5), st.sampled_from([b"", b"A: b\r\nC: d\r\n"]))
def test_what_is_encoded_reads_back_in_an_independent_reader(
    payloads: list[bytes], trailers: bytes
) -> None:
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert isinstance(reader.next_event(), h11.Request)
    reader.receive_data(b"".join(map(chunk, payloads)) + last_chunk(trailers))
    seen = b""
    while isinstance(event := reader.next_event(), h11.Data):
        seen += event.data
    assert seen == b"".join(payloads)
    assert isinstance(event, h11.EndOfMessage)
    assert b"".join(b"%b: %b\r\n" % pair for pair in event.headers) == trailers.lower()


class Counting(ChunkedDecoder):
    """Counts the bytes that are copied to look at lines and trailers."""

    copied = 0

    def _feed_line(self, data: bytes) -> int:
        self.copied += len(data) + len(self._line)
        return super()._feed_line(data)

    def _feed_trailers(self, data: bytes) -> int:
        self.copied += len(data) + len(self._line)
        return super()._feed_trailers(data)


@pytest.mark.parametrize("one", [b"1\r\nx\r\n", b"1;" + b"e" * 900 + b"\r\nx\r\n"])
def test_the_work_for_small_chunks_grows_with_their_number_only(one: bytes) -> None:
    work = []
    for count in (1000, 2000):
        body = Counting(REMOVE)
        run(body, [one * count])
        work.append(body.copied)
    assert work[1] <= 2.1 * work[0]

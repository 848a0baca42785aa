from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.wire.fields import (
    MalformedError,
    TooLargeError,
    forwardable_trailers,
    has_bare_lf,
    is_token,
    likeness,
    list_members,
    parse_fields,
    serialise,
    with_plain_length,
)
from dstack_mesh.wire.limits import MAX_FIELDS

NOTHING: frozenset[bytes] = frozenset()
TCHAR = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()
NAMES = st.lists(st.sampled_from(list(TCHAR)), min_size=1, max_size=12).map(bytes)
VALUE_BYTES = [9, *range(0x20, 0x7F), *range(0x80, 0x100)]
VALUES = st.lists(st.sampled_from(VALUE_BYTES), max_size=24).map(bytes)


@pytest.mark.parametrize(
    ("block", "fields"),
    [
        (b"", []),
        (b"A: b\r\n", [(b"A", b"b")]),
        (b"A:b\r\n", [(b"A", b"b")]),
        (b"A:\r\n", [(b"A", b"")]),
        (b"A: \t \r\n", [(b"A", b"")]),
        (b"A: \t b c\t \r\n", [(b"A", b"b c")]),
        (b"A: b: c\r\n", [(b"A", b"b: c")]),
        (b"A: 1\r\na: 2\r\nA: 3\r\n", [(b"A", b"1"), (b"a", b"2"), (b"A", b"3")]),
        (b"!#$%&'*+-.^_`|~09azAZ: x\r\n", [(b"!#$%&'*+-.^_`|~09azAZ", b"x")]),
        (b"A: \x80\xff caf\xc3\xa9\r\n", [(b"A", b"\x80\xff caf\xc3\xa9")]),
        (b"A: b\tc\r\n", [(b"A", b"b\tc")]),
    ],
    ids=repr,
)
def test_accepted_field_lines_rfc9112_5(block: bytes, fields: list[tuple[bytes, bytes]]) -> None:
    assert parse_fields(block) == fields


@pytest.mark.parametrize(
    ("rule", "block", "fault"),
    [
        ("RFC 9112 5.1: space before the colon", b"A : b\r\n", "line 1 is named by"),
        ("RFC 9112 5.1: tab before the colon", b"A\t: b\r\n", "line 1 is named by"),
        ("RFC 9112 5.2: folded with a space", b"A: b\r\n c\r\n", "line 2 is folded"),
        ("RFC 9112 5.2: folded with a tab", b"A: b\r\n\tc: d\r\n", "line 2 is folded"),
        ("RFC 9112 2.2: white space before the first", b" A: b\r\n", "line 1 is folded"),
        ("RFC 9112 2.2: bare LF", b"A: b\nC: d\r\n", "line 1 is broken by a bare CR or LF"),
        ("RFC 9112 2.2: bare LF at the end", b"A: b\n", "line 1 is broken by a bare CR or LF"),
        ("RFC 9112 2.2: bare CR in a value", b"A: b\rC: d\r\n", "line 1 is broken by a bare"),
        ("RFC 9112 2.2: bare CR in a name", b"A\rB: d\r\n", "line 1 is broken by a bare"),
        ("RFC 9112 2.2: bare CR at the end", b"A: b\r\r\n", "line 1 is broken by a bare"),
        ("RFC 9112 2.2: bare LF and CR that balance", b"A: b\n\rC: d\r\n", "line 1 is broken"),
        ("RFC 9110 5.5: NUL", b"A: b\0c\r\n", "line 1 is valued with a control byte"),
        ("RFC 9110 5.5: escape", b"A: \x1b\r\n", "line 1 is valued with a control byte"),
        ("RFC 9110 5.5: DEL", b"X: y\r\nA: \x7f\r\n", "line 2 is valued with a control byte"),
        ("RFC 9110 5.1: no name", b": b\r\n", "line 1 is named by something"),
        ("RFC 9110 5.1: name of other than token", b"A(: b\r\n", "line 1 is named by something"),
        ("RFC 9110 5.1: name of other than ASCII", b"\xc3\xa4: b\r\n", "line 1 is named by"),
        ("RFC 9110 5.1: NUL in a name", b"A\0: b\r\n", "line 1 is named by something"),
        ("RFC 9112 5: no colon", b"A: b\r\nC\r\n", "line 2 is without a colon"),
        ("RFC 9112 5: an empty line inside", b"A: b\r\n\r\nC: d\r\n", "a field line is empty"),
    ],
)
def test_refused_field_lines(rule: str, block: bytes, fault: str) -> None:
    with pytest.raises(MalformedError, match=fault):
        parse_fields(block)


def test_the_limit_on_field_lines() -> None:
    assert len(parse_fields(b"a: b\r\n" * MAX_FIELDS)) == MAX_FIELDS
    with pytest.raises(TooLargeError, match=f"{MAX_FIELDS + 1} field lines"):
        parse_fields(b"a: b\r\n" * (MAX_FIELDS + 1))


def test_a_length_with_leading_zeros_is_written_anew() -> None:
    block = b"X: content-length: 007\r\nContent-Length: 007\r\n"
    assert with_plain_length(block, b"007", 7) == b"X: content-length: 007\r\nContent-Length: 7\r\n"
    assert with_plain_length(b"Content-Length: 00\r\n", b"00", 0) == b"Content-Length: 0\r\n"
    assert with_plain_length(b"Content-Length: 0\r\n", b"0", 0) == b"Content-Length: 0\r\n"
    assert with_plain_length(b"Content-Length: 10\r\n", b"10", 10) == b"Content-Length: 10\r\n"


@given(st.text("a\r\n", max_size=12).map(str.encode), st.integers(0, 12))
def test_a_bare_lf_is_found_in_whichever_piece_it_comes(data: bytes, start: int) -> None:
    def bare(part: bytes) -> bool:
        return b"\n" in part.replace(b"\r\n", b"")

    start = min(start, len(data))
    assert has_bare_lf(data, 0) is bare(data)
    assert (has_bare_lf(data[:start], 0) or has_bare_lf(data, start)) is bare(data)


@given(st.lists(st.tuples(NAMES, VALUES.map(lambda v: v.strip(b" \t"))), max_size=8))
def test_what_is_serialised_parses_back(fields: list[tuple[bytes, bytes]]) -> None:
    assert parse_fields(serialise(fields)) == fields


@given(st.binary(max_size=64) | st.text("a: \r\n\t\0_", max_size=24).map(str.encode))
def test_any_bytes_are_understood_whole_or_refused(block: bytes) -> None:
    block += b"\r\n"
    try:
        fields = parse_fields(block)
    except MalformedError:
        return
    lines = block.split(b"\r\n")[:-1]
    assert len(fields) == len(lines)
    for (name, value), line in zip(fields, lines, strict=True):
        assert is_token(name)
        assert not set(value) & {0, 10, 13, 127}
        assert line.startswith(name + b":")
        assert line[len(name) + 1 :].strip(b" \t") == value


@pytest.mark.parametrize(
    "line",
    [b"A:" + b" " * 60_000 + b"\0\r\n", b"A: " + b"\t " * 30_000 + b"\x7f\r\n", b"A" * 60_000],
    ids=["blanks", "tabs", "no colon"],
)
def test_hostile_values_do_not_make_the_matcher_backtrack(line: bytes) -> None:
    # A matcher that backtracks over these takes minutes: the suite's time limit ends the test.
    with pytest.raises(MalformedError):
        parse_fields(line + b"\r\n")


@pytest.mark.parametrize(
    ("value", "members"),
    [
        (b"", []),
        (b",", []),
        (b"a", [b"a"]),
        (b"A, b", [b"a", b"b"]),
        (b" \tA\t,, ,b c , ", [b"a", b"b c"]),
    ],
)
def test_list_members_rfc9110_5_6_1(value: bytes, members: list[bytes]) -> None:
    assert list_members(value) == members


def test_tokens_rfc9110_5_6_2() -> None:
    assert is_token(TCHAR)
    assert [b for b in range(256) if is_token(bytes([b]))] == sorted(TCHAR)
    assert not is_token(b"")


@pytest.mark.parametrize(
    "name", [b"x_dstack-app_id", b"X-DSTACK-APP-ID", b"X.Dstack.App.Id", b"x!dstack~app|id"]
)
def test_a_name_is_like_the_one_that_a_cgi_would_read(name: bytes) -> None:
    assert likeness(name) == b"x-dstack-app-id"


def test_letters_and_digits_make_a_difference() -> None:
    assert len({likeness(b"x" + bytes([tchar])) for tchar in TCHAR}) == 26 + 10 + 1


@pytest.mark.parametrize(
    "name",
    [
        *(b"Transfer-Encoding", b"Content-Length", b"Host", b"Trailer", b"TE", b"Connection"),
        *(b"Authorization", b"Cookie", b"Set-Cookie", b"Content-Type", b"Content-Encoding"),
        *(b"content_length", b"Transfer_Encoding", b"Expect", b"Upgrade", b"Keep-Alive"),
        *(b"X-Forwarded-For", b"x_forwarded_for", b"X-Own", b"x_own", b"X_OWN"),
    ],
)
def test_fields_that_never_stand_in_trailers_rfc9110_6_5_1(name: bytes) -> None:
    block = b"A: 1\r\n" + name + b": 2\r\nB: 3\r\n"
    assert forwardable_trailers(block, frozenset((b"x-own",))) == b"A: 1\r\nB: 3\r\n"


def test_other_trailers_go_on_as_they_came() -> None:
    block = b"X-Checksum: \t1 \r\ngrpc-status: 0\r\nX-Checksum: 2\r\n"
    wanted = b"X-Checksum: 1\r\ngrpc-status: 0\r\nX-Checksum: 2\r\n"
    assert forwardable_trailers(block, NOTHING) == wanted
    assert forwardable_trailers(b"", NOTHING) == b""


def test_malformed_trailers_are_refused() -> None:
    with pytest.raises(MalformedError):
        forwardable_trailers(b"A : b\r\n", NOTHING)

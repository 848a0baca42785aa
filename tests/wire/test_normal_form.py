"""The short way through field lines in normal form gives what the long way gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.errors import MeshError
from dstack_mesh.wire import request
from dstack_mesh.wire.fields import (
    NormalForm,
    likeness,
    parse_fields,
    serialise,
    with_plain_length,
    without,
)
from dstack_mesh.wire.limits import MAX_FIELDS
from dstack_mesh.wire.request import parse_request_fields

WANTED = frozenset((b"x-own", b"host"))


def wanted(block: bytes) -> list[tuple[bytes, bytes]] | None:
    return NormalForm(WANTED).special_fields(block)


def test_wanted_fields_are_found_under_every_spelling() -> None:
    block = b"Host: a\r\nA: 1\r\nX_OWN: b: c\r\nB: 2\r\nx.own: d\r\n"
    assert wanted(block) == [(b"Host", b"a"), (b"X_OWN", b"b: c"), (b"x.own", b"d")]
    assert wanted(b"A: 1\r\n") == []
    assert wanted(b"") == []


@pytest.mark.parametrize(
    "block",
    [
        *(b"A:1\r\n", b"A:  1\r\n", b"A: \t1\r\n", b"A:\t1\r\n", b"A: 1 \r\n", b"A: 1\t\r\n"),
        *(b"A: \r\n", b"A:\r\n", b"A\r\n", b": a\r\n", b"A : 1\r\n", b" A: 1\r\n"),
        *(b"A: 1\n", b"A: 1", b"A: 1\r\nB: 2", b"A: 1\nB: 2\r\n", b"A: 1\rB: 2\r\n"),
        *(b"A: \x00\r\n", b"A: a\x7f\r\n", b"A\xe9: 1\r\n", b"\r\n", b"A: 1\r\n\r\n"),
        b"A: 1\r\n" * (MAX_FIELDS + 1),
    ],
)
def test_any_other_form_is_left_to_the_strict_parser(block: bytes) -> None:
    assert wanted(block) is None


@pytest.mark.parametrize("block", [b"a:b: c\r\n", b"a b: c\r\n", b"a/b: c\r\n"])
def test_a_name_that_is_none_is_never_learnt(block: bytes) -> None:
    form = NormalForm(WANTED)
    assert form.special_fields(block) is None
    assert form.special_fields(block) is None


def test_what_is_remembered_is_bounded() -> None:
    form = NormalForm(WANTED)
    for number in range(5000):
        assert form.special_fields(b"X-%d: 1\r\nX-Own: 2\r\n" % number) == [(b"X-Own", b"2")]
    long = b"x" * 4000
    assert form.special_fields(long + b": 1\r\n") == []
    assert len(form._kinds) <= 1024
    assert long not in form._kinds


PIECES = st.sampled_from(
    [
        b"A",
        b"Host",
        b"x-own",
        b"X_Own",
        b": ",
        b":",
        b" ",
        b"\t",
        b"1",
        b"a b",
        b"\r\n",
        b"\n",
        b"\xe9",
    ]
)


@given(st.lists(PIECES, max_size=40).map(b"".join))
def test_what_is_in_normal_form_is_what_the_strict_parser_writes_back(block: bytes) -> None:
    found = wanted(block)
    if found is None:
        return
    fields = parse_fields(block)
    assert serialise(fields) == block
    assert found == [field for field in fields if likeness(field[0]) in WANTED]


@given(st.lists(st.lists(PIECES, max_size=20).map(b"".join), max_size=6))
def test_what_came_before_makes_no_difference(blocks: list[bytes]) -> None:
    form = NormalForm(WANTED)
    for block in [*blocks, *blocks]:
        assert form.special_fields(block) == wanted(block)


@pytest.mark.parametrize("end", [b"1", b"", b"a b", b" ", b"1 "])
def test_a_known_shape_is_held_to_the_same_rules(end: bytes) -> None:
    form = NormalForm(WANTED)
    assert form.special_fields(b"A: 1\r\nHost: a\r\n") == [(b"Host", b"a")]
    block = b"A: 2\r\nHost: " + end + b"\r\n"
    assert form.special_fields(block) == wanted(block)
    for other in (b"B: 2\r\nHost: a\r\n", b"A: 2\r\nhost: a\r\n", b"A: 2\r\nHost:a\r\n"):
        assert form.special_fields(other) == wanted(other)


def test_shapes_are_bounded_in_number_and_size() -> None:
    form = NormalForm(WANTED)
    for number in range(20):
        for _ in range(2):
            assert form.special_fields(b"X-%d: 1\r\nHost: 2\r\n" % number) == [(b"Host", b"2")]
    assert [len(shapes) for shapes in form._shapes.values()] == [4]
    large = b"".join(b"%b: 1\r\n" % (b"x" * size) for size in range(1000, 1003))
    assert form.special_fields(large) == []
    assert 3 not in form._shapes


LINES = st.sampled_from(
    [
        *(b"Host: a\r\n", b"A: 1\r\n", b"X-Own: 2\r\n", b"x_own: 3\r\n", b"TE: trailers\r\n"),
        *(b"Connection: x-own, A\r\n", b"Connection: close\r\n", b"Content-Length: 007\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Keep-Alive: 1\r\n", b"x-request-id: 9\r\n"),
        *(b"Upgrade: websocket\r\n", b"Connection: upgrade\r\n", b"content_length: 1\r\n"),
    ]
)


@given(st.lists(LINES, max_size=9), st.sampled_from([None, b"b.example"]))
def test_both_ways_give_the_same(lines: list[bytes], authority: bytes | None) -> None:
    block = b"".join(lines)
    long_way = block.replace(b": ", b":  ")
    assert understood(block, authority) == understood(long_way, authority)


def understood(block: bytes, authority: bytes | None) -> object:
    try:
        fields = parse_request_fields(block, 1, frozenset((b"x-own",)), authority)
    except MeshError as error:
        return str(error)
    return {name: getattr(fields, name) for name in fields.__slots__}


def test_lines_are_cut_out_whole() -> None:
    block = b"A: 1\r\nB: A: 1\r\nA: 1\r\nC: 2\r\n"
    assert without(block, [(b"A", b"1")]) == b"B: A: 1\r\nA: 1\r\nC: 2\r\n"
    assert without(block, [(b"A", b"1"), (b"A", b"1")]) == b"B: A: 1\r\nC: 2\r\n"
    assert without(block, [(b"C", b"2"), (b"C", b"2")]) == b"A: 1\r\nB: A: 1\r\nA: 1\r\n"


def test_a_length_with_leading_zeros_is_written_anew() -> None:
    block = b"X: content-length: 007\r\nContent-Length: 007\r\n"
    assert with_plain_length(block, b"007", 7) == b"X: content-length: 007\r\nContent-Length: 7\r\n"
    assert with_plain_length(b"Content-Length: 00\r\n", b"00", 0) == b"Content-Length: 0\r\n"
    assert with_plain_length(b"Content-Length: 0\r\n", b"0", 0) == b"Content-Length: 0\r\n"
    assert with_plain_length(b"Content-Length: 10\r\n", b"10", 10) == b"Content-Length: 10\r\n"


def test_one_form_serves_all_heads_of_a_direction() -> None:
    names = frozenset((b"x-once",))
    assert request._normal_form(names) is request._normal_form(frozenset((b"x-once",)))

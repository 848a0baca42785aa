"""Python's way and C's take the same apart, and give what the strict parser says.

C's is compiled here, with every warning an error, and once more with what finds undefined
behaviour.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.wire.in_c import SANITIZED, STRICT, CannotBuildError, build

from dstack_mesh.wire import take_apart
from dstack_mesh.wire.fields import MalformedError, likeness, parse_fields, serialise
from dstack_mesh.wire.limits import MAX_FIELDS
from dstack_mesh.wire.take_apart import DROP_ALIKE, DROP_EXACT, TELL_ALIKE, NormalForm

Parts = tuple[bytes, list[tuple[int, bool, bytes, bytes]]]

LONGEST = b"x-" + b"n" * 30
"""A name of 32 bytes."""

TABLE = (
    (b"host", TELL_ALIKE),
    (b"connection", DROP_EXACT),
    (b"x-own", DROP_EXACT | DROP_ALIKE | TELL_ALIKE),
    (b"x-id", 0),
    (b"x-alike", DROP_ALIKE),
    (LONGEST, DROP_EXACT),
)
FLAGS = dict(TABLE)
NAMES = [name for name, _ in TABLE]

HEAD = (
    b"Host: a.example\r\nConnection: keep-alive\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n"
    b"X-Own: 1\r\nx_own: 2\r\nX-Id: 7\r\nx.id: 8\r\nX-Alike: 3\r\nX_Alike: 4\r\nCookie: a=1\r\n"
)


@pytest.fixture(scope="session", params=["python", "c", "c, sanitized"])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give what `NormalForm` takes as `in_c`."""
    if request.param == "python":
        return None
    flags = STRICT if request.param == "c" else SANITIZED
    try:
        return build(tmp_path_factory.mktemp("in_c"), flags)
    except CannotBuildError as error:
        pytest.skip(str(error))


def by_the_strict_parser(block: bytes) -> Parts | None:
    """Say what must come out, by a reader that shares nothing with either way but the table."""
    try:
        fields = parse_fields(block)
    except MalformedError:
        return None
    if serialise(fields) != block or not all(value for _, value in fields):
        return None
    if any(set(value) & {0x09} for _, value in fields):
        return None  # a tab is legal, and rare
    kept, found = [], []
    for name, value in fields:
        alike = likeness(name)
        flags = FLAGS.get(alike)
        if flags is None:
            kept.append((name, value))
            continue
        exact = name.lower() == alike
        if exact or flags & TELL_ALIKE:
            found.append((NAMES.index(alike), exact, name, value))
        if not flags & (DROP_EXACT if exact else DROP_ALIKE):
            kept.append((name, value))
    return serialise(kept), found


def test_what_is_in_the_table_is_found_and_dropped_as_it_says(way: Any) -> None:
    rest = (
        b"Host: a.example\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n"
        b"X-Id: 7\r\nx.id: 8\r\nX-Alike: 3\r\nCookie: a=1\r\n"
    )
    assert NormalForm(TABLE, way).take_apart(HEAD) == (
        rest,
        [
            (0, True, b"Host", b"a.example"),
            (1, True, b"Connection", b"keep-alive"),
            (2, True, b"X-Own", b"1"),
            (2, False, b"x_own", b"2"),
            (3, True, b"X-Id", b"7"),
            (4, True, b"X-Alike", b"3"),
        ],
    )


@pytest.mark.parametrize(
    ("block", "rest"),
    [
        (b"", b""),
        (b"A: 1\r\n", b"A: 1\r\n"),
        (b"X-Own: 1\r\n", b""),
        (b"X-Own: 1\r\nX-Own: 1\r\n", b""),
        (b"X-Own: 1\r\nA: X-Own: 1\r\n", b"A: X-Own: 1\r\n"),
        (b"A: X-Own: 1\r\nX-Own: 1\r\n", b"A: X-Own: 1\r\n"),
        (b"A: 1\r\nX-Own: 1\r\nB: 2\r\nX-Own: 2\r\nC: 3\r\n", b"A: 1\r\nB: 2\r\nC: 3\r\n"),
    ],
)
def test_lines_are_cut_out_whole(way: Any, block: bytes, rest: bytes) -> None:
    parts = NormalForm(TABLE, way).take_apart(block)
    assert parts is not None
    assert parts[0] == rest


@pytest.mark.parametrize(
    "block",
    [
        *(b"A:1\r\n", b"A:  1\r\n", b"A: \t1\r\n", b"A:\t1\r\n", b"A: 1 \r\n", b"A: 1\t\r\n"),
        *(b"A: \r\n", b"A:\r\n", b"A\r\n", b": a\r\n", b"A : 1\r\n", b" A: 1\r\n", b"A: a\tb\r\n"),
        *(b"A: 1\n", b"A: 1", b"A: 1\r", b"A: 1\r\nB: 2", b"A: 1\nB: 2\r\n", b"A: 1\rB: 2\r\n"),
        *(b"A: \x00\r\n", b"A: a\x7f\r\n", b"A\xe9: 1\r\n", b"\r\n", b"A: 1\r\n\r\n", b"\n\r"),
        *(b"A: 1\r\r\n", b"A: 1\n\r\n", b"A: 1\r\nB", b"A: 1\r\nB:", b"A: 1\r\nB: ", b"A", b"A:"),
        *(b"a:b: c\r\n", b"a b: c\r\n", b"a/b: c\r\n", b"A: 1\r\n B: 2\r\n", b"X-Own: 1\r\nB\r\n"),
        *(b"X-Own: 1\r\nA: 1\r", b"X-Own: 1", b"X-Own: ", b"X-Own:"),
    ],
)
def test_any_other_form_is_left_to_the_strict_parser(way: Any, block: bytes) -> None:
    form = NormalForm(TABLE, way)
    assert form.take_apart(block) is None
    assert form.take_apart(block) is None, "and nothing was learnt of it"


@pytest.mark.parametrize("line", [b"A: 1\r\n", b"X-Own: 1\r\n", b"Host: a\r\n"])
def test_the_limit_on_lines(way: Any, line: bytes) -> None:
    form = NormalForm(TABLE, way)
    assert form.take_apart(line * MAX_FIELDS) == by_the_strict_parser(line * MAX_FIELDS)
    assert form.take_apart(line * MAX_FIELDS) is not None
    assert form.take_apart(line * (MAX_FIELDS + 1)) is None


@pytest.mark.parametrize("size", [1, 30, 31, 32, 33, 34, 4000])
def test_names_up_to_and_beyond_what_a_table_holds(way: Any, size: int) -> None:
    name = (b"X_" + b"n" * 5000)[:size]
    for spelling in (name, name.replace(b"_", b"-"), name.upper()):
        block = b"A: 1\r\n%b: v\r\nB: 2\r\n" % spelling
        assert NormalForm(TABLE, way).take_apart(block) == by_the_strict_parser(block)
    exact = NormalForm(TABLE, way).take_apart(LONGEST + b": v\r\n")
    assert exact == (b"", [(5, True, LONGEST, b"v")])


@pytest.mark.parametrize("before", [b"", b"X-Own: 0\r\n", b"A: 1\r\n"])
def test_every_byte_at_every_place(way: Any, before: bytes) -> None:
    form = NormalForm(TABLE, way)
    line = before + b"Host: ab\r\nB: c\r\n"
    for place in range(len(line) + 1):
        for byte in range(256):
            sign = bytes((byte,))
            for block in (
                line[:place] + sign + line[place + 1 :],
                line[:place] + sign + line[place:],
            ):
                assert form.take_apart(block) == by_the_strict_parser(block), block


def test_every_beginning(way: Any) -> None:
    form = NormalForm(TABLE, way)
    for end in range(len(HEAD) + 1):
        # Of its own, so that what reads beyond the end reads beyond the object's.
        assert form.take_apart(HEAD[:end]) == by_the_strict_parser(HEAD[:end])


PIECES = st.sampled_from(
    [
        *(b"A", b"Host", b"x-own", b"X_Own", b"x-ID", b"Connection", b"x.alike", LONGEST, b"-"),
        *(b": ", b": ", b": ", b":", b" ", b"\t", b"1", b"a b", b"\xe9", b"\0", b"\x7f"),
        *(b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"),
    ]
)
SOUP = st.lists(PIECES, max_size=40).map(b"".join)
LINES = st.lists(
    st.tuples(PIECES, st.sampled_from([b"1", b"a b", b"x-own", b"\xff", b"b: c"])).map(
        lambda pair: b"%b: %b\r\n" % pair
    ),
    max_size=12,
).map(b"".join)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    head = bytearray(HEAD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(head)))
        head[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | PIECES)
    return bytes(head)


@given(SOUP | LINES | mutated() | st.binary(max_size=80))
@example(HEAD)
def test_any_block_is_what_the_strict_parser_says(way: Any, block: bytes) -> None:
    assert NormalForm(TABLE, way).take_apart(block) == by_the_strict_parser(block)


@given(st.lists(SOUP | LINES, max_size=6))
def test_what_came_before_makes_no_difference(way: Any, blocks: list[bytes]) -> None:
    form = NormalForm(TABLE, way)
    for block in [*blocks, *blocks]:
        assert form.take_apart(block) == by_the_strict_parser(block)


def test_a_block_from_which_nothing_is_dropped_is_not_copied(way: Any) -> None:
    block = b"Host: a\r\nA: 1\r\n"
    parts = NormalForm(TABLE, way).take_apart(block)
    assert parts is not None
    assert parts[0] is block


def test_nothing_is_leaked(way: Any) -> None:
    form = NormalForm(TABLE, way)
    block = b"Host: a\r\nX-Own: 1\r\n"
    for _ in range(3):
        form.take_apart(block)
    before = sys.getrefcount(block), sys.getrefcount(None), sys.getrefcount(True)
    for _ in range(1000):
        form.take_apart(block)
        form.take_apart(b"X-Own: 1\r\nHost: a\r\nbad")
    after = sys.getrefcount(block), sys.getrefcount(None), sys.getrefcount(True)
    assert all(new - old < 100 for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (tuple((b"n%d" % number, 0) for number in range(33)), "33 names"),
        (((b"", 0),), "is not 1 to 32"),
        (((b"n" * 33, 0),), "is not 1 to 32"),
        (((b"Host", 0),), "is not 1 to 32"),
        (((b"x_own", 0),), "is not 1 to 32"),
        (((b"a", 0), (b"b", 0), (b"a", 1)), "twice"),
    ],
)
def test_tables_that_are_refused(way: Any, table: tuple[tuple[bytes, int], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NormalForm(table, way)


def test_the_largest_table(way: Any) -> None:
    form = NormalForm(tuple((b"n%d" % number, 0) for number in range(32)), way)
    assert form.take_apart(b"N31: 1\r\n") == (b"N31: 1\r\n", [(31, True, b"N31", b"1")])
    assert NormalForm((), way).take_apart(HEAD) == (HEAD, [])


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> Any:
    try:
        return build(tmp_path_factory.mktemp("in_c"), SANITIZED)
    except CannotBuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "table",
    [
        tuple((b"n", 0) for _ in range(33)),
        ((b"", 0),),
        ((b"n" * 33, 0),),
        [(b"n", 0)],
        ("n",),
        (("n", 0),),
        ((b"n",),),
        ((b"n", 2**40),),
    ],
)
def test_c_holds_tables_to_its_own_bounds(in_c: Any, table: Any) -> None:
    with pytest.raises((ValueError, TypeError, SystemError, OverflowError)):
        in_c.table(table)


def test_c_takes_nothing_but_bytes_and_its_own_table(in_c: Any) -> None:
    table = in_c.table(TABLE)
    for wrong in ((bytearray(b"A: 1\r\n"), table), ("A", table), (b"",), (b"", table, 1), ()):
        with pytest.raises(TypeError, match=r"take_apart\(block: bytes, table\)"):
            in_c.take_apart(*wrong)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        in_c.take_apart(b"", object())


# Python's memory of names.


def test_what_is_remembered_is_bounded() -> None:
    form = NormalForm(TABLE, None)
    for number in range(5000):
        parts = form.take_apart(b"X-%d: 1\r\nX-Id: 2\r\n" % number)
        assert parts is not None
        assert parts[1] == [(3, True, b"X-Id", b"2")]
    long = b"x" * 4000
    assert form.take_apart(long + b": 1\r\n") == (long + b": 1\r\n", [])
    assert len(form._known) <= 1024
    assert long not in form._known


# Which of the two is taken.


class FakeModule:
    """Stands for the compiled module."""

    def table(self, pairs: tuple[tuple[bytes, int], ...]) -> str:
        return f"table of {len(pairs)}"

    def take_apart(self, block: bytes, table: str) -> Parts:
        return b"%b by the %b" % (block, table.encode()), []


@pytest.fixture
def loaded_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a function that loads the module anew, beside a compiled one or without."""

    def load(beside: object) -> Any:
        monkeypatch.delattr("dstack_mesh.wire._take_apart", raising=False)
        monkeypatch.setitem(sys.modules, "dstack_mesh.wire._take_apart", beside)  # type: ignore[arg-type]
        spec = importlib.util.spec_from_file_location("take_apart_anew", Path(take_apart.__file__))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_compiled_module_is_used_where_there_is_one(loaded_with: Any) -> None:
    form = loaded_with(FakeModule()).NormalForm(TABLE)
    assert form.take_apart(b"A: 1") == (b"A: 1 by the table of 6", [])


def test_python_does_it_where_there_is_none(loaded_with: Any) -> None:
    form = loaded_with(None).NormalForm(TABLE)
    assert form.take_apart(HEAD) == by_the_strict_parser(HEAD)

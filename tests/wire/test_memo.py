from __future__ import annotations

import pytest

from dstack_mesh.wire.memo import BlockMemo


class Maker:
    """Makes a list of each block, and counts."""

    def __init__(self) -> None:
        self.made: list[bytes] = []

    def __call__(self, block: bytes) -> list[bytes]:
        if b"bad" in block:
            raise ValueError(block)
        self.made.append(block)
        return [block]


def test_a_block_that_comes_back_is_kept() -> None:
    make = Maker()
    memo = BlockMemo(make)
    memo.get(b"a")
    second = memo.get(b"a")
    assert memo.get(bytes(bytearray(b"a"))) is second
    assert memo.get(b"A") == [b"A"]
    assert make.made == [b"a", b"a", b"A"]


def test_what_never_comes_back_is_not_kept() -> None:
    memo = BlockMemo(Maker())
    for number in range(10_000):
        memo.get(b"%d" % number)
        assert len(memo._seen) <= 4096
    assert not memo._known


def test_a_failure_is_raised_each_time_and_not_kept() -> None:
    memo = BlockMemo(Maker())
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            memo.get(b"bad")


def test_large_blocks_are_not_kept() -> None:
    make = Maker()
    memo = BlockMemo(make)
    for size in (2048, 2048, 2048, 2049, 2049, 2049):
        memo.get(b"x" * size)
    assert [len(block) for block in make.made] == [2048, 2048, 2049, 2049, 2049]


def test_the_number_of_blocks_is_bounded() -> None:
    make = Maker()
    memo = BlockMemo(make)
    for number in range(2000):
        for _ in range(2):
            memo.get(b"%d" % number)
        assert len(memo._known) <= 512
    memo.get(b"1999")
    assert len(make.made) == 4000

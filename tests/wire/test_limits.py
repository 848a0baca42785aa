"""The bounds are the contract's; each is held at its edge by the tests of what applies it."""

from __future__ import annotations

from dstack_mesh.wire import limits


def test_the_bounds_are_the_contracts() -> None:
    assert limits.MAX_HEAD_BYTES == 64 * 1024
    assert limits.MAX_FIELDS == 128
    assert limits.MAX_REQUEST_TARGET_BYTES == 16 * 1024
    assert limits.MAX_INTERIM_RESPONSES == 16


def test_a_request_target_at_its_limit_fits_into_a_head() -> None:
    assert limits.MAX_REQUEST_TARGET_BYTES < limits.MAX_HEAD_BYTES


def test_a_chunk_line_holds_the_longest_size() -> None:
    assert limits.MAX_CHUNK_SIZE_DIGITS < limits.MAX_CHUNK_LINE_BYTES

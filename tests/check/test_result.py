from __future__ import annotations

import pytest

from dstack_mesh.check.result import Group, Result, all_well, failed, ok, skipped, warning


@pytest.mark.parametrize(
    ("result", "well"),
    [
        (ok("a", "b"), True),
        (warning("a", "b", "c"), True),
        (skipped("a", "b"), True),
        (failed("a", "b", "c"), False),
    ],
)
def test_only_failures_count(result: Result, well: bool) -> None:
    assert all_well([Group("x", (ok("a", "b"),)), Group("y", (ok("a", "b"), result))]) is well

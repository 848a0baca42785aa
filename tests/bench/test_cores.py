from __future__ import annotations

import pytest
from bench.cores import Layout, split


@pytest.mark.parametrize(
    ("available", "layout"),
    [
        ([], Layout(None, None)),
        ([3], Layout(None, None)),
        ([1, 0], Layout("0", "1")),
        ([2, 3, 4, 5], Layout("2", "3,4,5")),
    ],
)
def test_the_subject_has_a_core_of_its_own_where_there_are_two(
    available: list[int], layout: Layout
) -> None:
    assert split(available) == layout


def test_pinning_is_by_role() -> None:
    layout = Layout("0", "1,2")

    assert layout.pin(["nginx"], "subject") == ["taskset", "-c", "0", "nginx"]
    assert layout.pin(["wrk", "-c1"], "load") == ["taskset", "-c", "1,2", "wrk", "-c1"]
    assert layout.pin(["any"], None) == ["any"]
    assert Layout(None, None).pin(["any"], "subject") == ["any"]

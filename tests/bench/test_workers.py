from __future__ import annotations

import pytest
from bench.parts.workers import speedup, used


def test_two_equal_workers_without_any_loss_are_twice_one() -> None:
    assert speedup(20.0, 20.0, [1.0, 1.0]) == 2.0


def test_the_busier_worker_is_the_limit() -> None:
    assert speedup(20.0, 20.0, [3.0, 1.0]) == pytest.approx(4 / 3)


def test_what_a_request_costs_more_is_lost() -> None:
    assert speedup(20.0, 25.0, [1.0, 1.0]) == pytest.approx(1.6)


def test_a_supervisor_is_no_worker() -> None:
    before = {1: 5.0, 2: 1.0, 3: 1.0}
    after = {1: 5.001, 2: 2.0, 3: 1.5}

    assert used(before, after) == [1.0, 0.5]

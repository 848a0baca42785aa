from __future__ import annotations

import pytest
from bench.h2load import parse_log, quantile, steady
from bench.wrk import FailedRequestsError

LOG = "1764515696000000\t200\t414\n1764515696000250\t200\t1024\n"


def test_starts_and_times_are_read() -> None:
    assert parse_log(LOG) == [(1764515696000000, 414), (1764515696000250, 1024)]


def test_columns_that_later_versions_add_are_left_out() -> None:
    assert parse_log("5\t200\t7\t9\n") == [(5, 7)]


@pytest.mark.parametrize("status", ["502", "-1"])
def test_an_answer_that_is_not_200_fails_the_run(status: str) -> None:
    with pytest.raises(FailedRequestsError, match=status):
        parse_log(f"{LOG}1764515696000300\t{status}\t12\n")


def test_only_what_all_connections_shared_counts_sorted_in_ms() -> None:
    second = 1_000_000
    rows = [(0, 9000), (second, 300), (2 * second - 1, 100), (2 * second, 9000)]

    assert steady(rows, ramp=1.0, seconds=1.0) == [0.1, 0.3]


@pytest.mark.parametrize(
    ("share", "value"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.0, 1)]
)
def test_quantiles_are_values_that_were_measured(share: float, value: float) -> None:
    assert quantile([float(number) for number in range(1, 101)], share) == value

from __future__ import annotations

import pytest
from bench.parts.outbound import below, quantiles


@pytest.mark.parametrize(
    ("most", "rate"),
    [
        ([40_000.0, 20_000.0], 5_000),
        ([40_000.0, 10_600.0], 4_200),
        ([40_000.0, 100.0], 100),
    ],
)
def test_the_rate_is_below_what_the_slowest_can_do(most: list[float], rate: int) -> None:
    assert below(most, 5_000) == rate


def test_three_quantiles_are_reported() -> None:
    times = [float(number) for number in range(1, 1001)]

    assert quantiles(times) == {"p50_ms": 500.0, "p99_ms": 990.0, "p999_ms": 999.0}

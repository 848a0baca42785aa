from __future__ import annotations

from typing import Any

import pytest
from bench.parts.all import PARTS
from bench.race import MEASURES
from bench.targets import TARGETS, judge, verdict


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, 1.1, 1.05], "met"),
        ([1.0, 1.2, 1.05], "met by the median, but only in 2 of 3 rounds"),
        ([1.0, 1.2, 1.15], "not met by the median; met in 1 of 3 rounds"),
        ([1.2, 1.3, 1.11], "not met"),
    ],
)
def test_the_verdict_tells_of_the_rounds(values: list[float], said: str) -> None:
    assert verdict(values, 1.1, at_least=False) == said


def test_what_is_to_be_reached_may_be_a_least_value() -> None:
    assert verdict([1.8], 1.7, at_least=True) == "met"
    assert verdict([1.6], 1.7, at_least=True) == "not met"


def part(scenario: str, measure: str, **values: list[float]) -> dict[str, Any]:
    row = {"scenario": scenario, "measure": measure, "values": values}
    return {"title": "Title", "rows": [row]}


def test_a_ratio_is_judged_by_the_ratio_and_a_value_by_the_value() -> None:
    parts = {
        "small-get": part(
            "small GET, 32 connections", "cpu_us", mesh=[22.0, 23.0], nginx=[20.0, 20.0]
        ),
        "memory": part("inbound, 512 MB up", "growth_mb", mesh=[17.0], nginx=[1.0]),
    }

    found = {one.name: one for one in judge(parts)}

    ratio = found["Title: small GET, 32 connections: CPU µs per request"]
    assert ratio.wanted == "≤ 1.1 of nginx's"
    assert ratio.measured == "1.125 (1.100 to 1.150)"
    assert ratio.verdict.startswith("not met by the median; met in 1 of 2")
    value = found["Title: inbound, 512 MB up: most memory above idle, MB"]
    assert (value.wanted, value.measured, value.verdict) == ("≤ 16", "17.0", "not met")


def test_what_was_not_run_is_not_called_met() -> None:
    assert {one.verdict for one in judge({})} == {"not measured"}
    lone = {"small-get": part("small GET, 32 connections", "cpu_us", mesh=[1.0])}
    assert {one.verdict for one in judge(lone)} == {"not measured"}


def test_targets_are_about_parts_and_measures_that_there_are() -> None:
    assert {target.part for target in TARGETS} <= PARTS.keys()
    assert {target.measure for target in TARGETS} <= MEASURES.keys()

from __future__ import annotations

from typing import Any

import pytest
from bench.report import BEGIN, END, number, render, replace_between_marks, table

BUILD = {"dstack-mesh": "0.1.0", "code": "pure", "Python": "3.11.7"}


def results(**part: Any) -> dict[str, Any]:
    whole = {
        "title": "Outbound, small GET",
        "build": BUILD,
        "date": "2026-11-30",
        "rounds": 2,
        "rows": [],
        "notes": [],
        "plain": {},
    }
    return {"machine": {"CPU": "A processor", "wrk": "4.1.0"}, "parts": {"small-get": whole | part}}


ROW = {
    "scenario": "small GET, 32 connections",
    "measure": "cpu_us",
    "values": {"mesh": [22.0, 26.0], "nginx": [20.0, 20.0], "HAProxy": [24.0, 26.0]},
}


def test_rows_have_medians_and_ratios_with_their_range() -> None:
    text = render(results(rows=[ROW]))

    assert "| scenario | measure | mesh | nginx | HAProxy | mesh / nginx | mesh / HAProxy |" in text
    assert (
        "| small GET, 32 connections | CPU µs per request | 24.0 | 20.0 | 25.0"
        " | 1.20 (1.10 to 1.30) | 0.96 (0.92 to 1.00) |"
    ) in text


def test_a_value_without_a_peer_has_its_range() -> None:
    row = {"scenario": "start", "measure": "ready_s", "values": {"mesh": [0.2, 0.4]}}

    assert "| start | ready after, s | 0.30 (0.20 to 0.40) |" in render(results(rows=[row]))


def test_a_subject_that_a_row_lacks_is_a_gap() -> None:
    lone = {"scenario": "alone", "measure": "cpu_us", "values": {"mesh": [1.0, 1.0]}}

    assert "| alone | CPU µs per request | 1.00 (1.00 to 1.00) |  |  |  |  |" in render(
        results(rows=[ROW, lone])
    )


def test_machine_build_notes_and_other_findings_are_told() -> None:
    text = render(results(notes=["A note."], plain={"held": "200 idle"}))

    assert "| CPU | A processor |" in text
    assert "| dstack-mesh | 0.1.0, pure Python |" in text
    assert "| Python | 3.11.7 |" in text
    assert "2026-11-30, 2 rounds, mesh in pure Python." in text
    assert "\n\nA note." in text
    assert "| held | 200 idle |" in text


def test_a_compiled_subject_is_told() -> None:
    text = render(results(build=BUILD | {"code": "compiled"}))

    assert "mesh in compiled hot modules" in text
    assert "pure Python" not in text


def test_parts_of_different_builds_are_told() -> None:
    whole = results(rows=[ROW])
    compiled = results(title="Other", build=BUILD | {"code": "compiled"}, date="2026-12-01")
    whole["parts"]["other"] = compiled["parts"]["small-get"]

    text = render(whole)

    assert "mesh in compiled hot modules and pure Python" in text
    assert "2026-11-30 to 2026-12-01" in text
    assert "Parts differ" in text


def test_text_outside_the_marks_stays() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"

    assert replace_between_marks(document, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


@pytest.mark.parametrize("document", ["", BEGIN, END])
def test_a_document_without_marks_is_left_alone(document: str) -> None:
    with pytest.raises(ValueError, match="no <!-- measured"):
        replace_between_marks(document, "new")


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "0.12"), (9.96, "9.96"), (12.34, "12.3"), (12_345.6, "12,346")]
)
def test_numbers_have_about_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_bar_in_a_cell_does_not_make_a_column() -> None:
    assert table(["a", "b"], [["x|y", "z"]]).splitlines()[-1] == "| x/y | z |"

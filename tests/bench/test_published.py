"""docs/performance.md and its chart say what docs/performance.json says."""

from __future__ import annotations

import pytest
from bench.__main__ import DOCUMENT, PUBLISHED

from bench import chart, report, results


@pytest.fixture
def published() -> results.Results:
    found = results.read(PUBLISHED)
    assert found is not None, "python -m bench --publish writes it"
    return found


def test_the_tables_are_those_of_the_json(published: results.Results) -> None:
    document = DOCUMENT.read_text()

    assert document == report.replace_between_marks(document, report.render(published)), (
        "python -m bench --render writes it anew"
    )


def test_the_chart_is_that_of_the_json(published: results.Results) -> None:
    assert PUBLISHED.with_suffix(".svg").read_text() == chart.draw(published), (
        "python -m bench --render writes it anew"
    )


def test_the_page_shows_the_chart(published: results.Results) -> None:
    assert f"]({PUBLISHED.with_suffix('.svg').name})" in DOCUMENT.read_text()
    assert published["parts"]

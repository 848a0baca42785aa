from __future__ import annotations

from pathlib import Path

from dstack_mesh.settings import docs

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_what_the_table_says() -> None:
    made = docs.document()
    assert PAGE.read_text() == made, "run: python -m dstack_mesh.settings.docs > docs/settings.md"

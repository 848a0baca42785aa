"""What the documents say is there, is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "dstack_mesh"
DOCUMENTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")),
]
FOLDERS = ("tests/", "src/", "docs/", "bench/", "fuzz/", "tools/")
PLACEHOLDERS = ("src/dstack_mesh/x/y.py", "tests/x/test_y.py")
"""What CONTRIBUTING.md names as an example of a pair."""

_BLOCK = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
_MODULE = re.compile(r"(\w+)(?:/\w+)*/\w+\.py")
_PLACEHOLDER = re.compile(r"/[A-Z]+(?=/|$)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")

NAMES = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def paths(text: str) -> Iterator[str]:
    """Give what stands in backticks and looks like a path of this repository."""
    for code in _CODE.findall(_BLOCK.sub("", text)):
        if not _PATH.fullmatch(code) or "/" not in code or code in PLACEHOLDERS:
            continue
        if _PLACEHOLDER.search(code):
            continue
        module = _MODULE.fullmatch(code)
        if code.startswith(FOLDERS) or (module and (PACKAGE / module[1]).is_dir()):
            yield code


def missing(text: str) -> list[str]:
    return [
        path for path in paths(text) if not (ROOT / path).exists() and not (PACKAGE / path).exists()
    ]


def anchors(text: str) -> set[str]:
    """Give the anchors of a document's headings, as the repository's pages make them."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@NAMES
def test_every_path_named_in_backticks_exists(document: Path) -> None:
    assert missing(document.read_text()) == []


@NAMES
def test_every_link_within_the_repository_leads_somewhere(document: Path) -> None:
    for link in _LINK.findall(document.read_text()):
        target, _, anchor = link.partition("#")
        if ":" in target:  # another site
            continue
        path = document.parent / target if target else document
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text()), link


def missing_tests(text: str) -> list[str]:
    return [
        f"{file}::{name}"
        for file, name in _TEST.findall(text)
        if not (ROOT / file).exists()
        or not re.search(rf"^(?:async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]


@NAMES
def test_every_test_that_is_named_exists(document: Path) -> None:
    assert missing_tests(document.read_text()) == []


def test_a_test_that_is_not_there_is_seen() -> None:
    here = "`tests/test_docs.py::test_a_test_that_is_not_there_is_seen`"
    gone = "`tests/test_docs.py::test_gone` `tests/gone.py::test_x`"
    assert missing_tests(here + gone) == ["tests/test_docs.py::test_gone", "tests/gone.py::test_x"]


def test_each_line_for_the_rust_meshs_users_names_its_test() -> None:
    text = (ROOT / "docs" / "from-the-rust-mesh.md").read_text()
    rows = [row for row in re.findall(r"^\|.+\|$", text, re.MULTILINE) if "checked by" not in row]
    lines = [row for row in rows if not re.fullmatch(r"[|-]+", row)]
    assert len(lines) > 30
    assert [row for row in lines if not _TEST.search(row)] == []


def test_a_path_that_is_not_there_is_seen() -> None:
    text = (
        "`tests/test_docs.py` `wire/body.py` `tests/` `wire/gone.py` `docs/gone.md` `a/b` `docs/X`"
    )
    assert list(paths(text)) == [
        "tests/test_docs.py",
        "wire/body.py",
        "tests/",
        "wire/gone.py",
        "docs/gone.md",
    ]
    assert missing(text) == ["wire/gone.py", "docs/gone.md"]


def test_the_threat_model_names_tests() -> None:
    """A defence with no test would be a claim."""
    text = (ROOT / "docs" / "threat-model.md").read_text()
    rows = re.findall(r"^\| .+ \|$", text, re.MULTILINE)
    defences = [row.split(" | ") for row in rows if row.count(" | ") == 2 and "shown by" not in row]
    assert len(defences) > 40
    for _, stopped_by, shown_by in defences:
        assert "`tests/" in shown_by or stopped_by.startswith("nothing"), shown_by

"""Regular expressions mean the same in every Python that the project runs on."""

from __future__ import annotations

import re
from pathlib import Path

import dstack_mesh

# CPython before 3.11.5 matches too much where a whole group repeats possessively.
POSSESSIVE_GROUP = re.compile(r"\)(?:[*+?]|\{[0-9,]+\})\+")


def possessive_groups(source: str) -> list[str]:
    lines = [line for line in source.splitlines() if re.search(r"""\brb?f?["']""", line)]
    return [line for line in lines if POSSESSIVE_GROUP.search(line)]


def test_no_group_repeats_possessively() -> None:
    root = Path(dstack_mesh.__file__).parent
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        for line in possessive_groups(path.read_text())
    ]
    assert found == []


def test_one_would_be_seen() -> None:
    assert possessive_groups('x = re.compile(rb"(?:a|b)*+c")')
    assert possessive_groups("x = re.compile(r'(?:a|b)++')")
    assert not possessive_groups('x = re.compile(rb"(?:[ab]*+)*c")')

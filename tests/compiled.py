"""Which tests can be run with the compiled package: `make compiled`.

A compiled class cannot be the base of one that is not, and its methods cannot be replaced. Tests
that put fakes in such places are for plain Python, and that is what they are run with.

`python -m tests.compiled` gives what to call pytest with.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "tests/tools",
    "tests/integration",
    "tests/http",
    "tests/inbound",
    "tests/outbound",
    "tests/policy",
    "tests/wire",
)
FAKES = "its fakes are of the relay's base classes"
PATCHES = "it replaces what a compiled module has by name"
NEEDS_PYTHON: dict[str, str] = {
    "tests/http/test_requests.py::test_any_pieces_give_the_same_result": FAKES,
}
"""Files of these folders, or tests of theirs, that cannot, and why."""


def arguments() -> list[str]:
    """Give pytest's arguments: the files that can, without those of their tests that cannot."""
    found = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).glob("test_*.py"))
    ]
    tests = [f"--deselect={name}" for name in NEEDS_PYTHON if "::" in name]
    return [*(name for name in found if name not in NEEDS_PYTHON), *tests]


if __name__ == "__main__":
    print(*arguments())  # noqa: T201 - what it is for

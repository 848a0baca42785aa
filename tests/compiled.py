"""Which tests can be run with the compiled package: `make compiled`.

A compiled class cannot be the base of one that is not, and its methods cannot be replaced. Tests
that put fakes in such places are for plain Python, and that is what they are run with.

`python -m tests.compiled` gives the files that can.
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
    "tests/ops",
    "tests/wire",
    "tests/tls",
)
NEEDS_PYTHON = {}
"""Files of these folders that cannot, and why."""


def files() -> list[str]:
    """Give the files that can."""
    found = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).glob("test_*.py"))
    ]
    return [name for name in found if name not in NEEDS_PYTHON]


if __name__ == "__main__":
    print(*files())  # noqa: T201 - what it is for

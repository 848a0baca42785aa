"""One process of libFuzzer: `python -m fuzz.child TARGET [libFuzzer's own arguments]`."""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-untyped,unused-ignore]  # it has no types

from fuzz.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    about = [f"dstack_mesh.{module}" for module in target.about]
    with atheris.instrument_imports(include=about):
        run, _ = target.load()
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

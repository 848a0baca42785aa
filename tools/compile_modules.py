"""`compile_modules.py GROUP MODULE.py ...`: compile modules in place with mypyc, here in this folder.

A process of its own, since mypyc goes by the working directory, and setuptools by `sys.argv`.
"""

from __future__ import annotations

import sys

from mypyc.build import mypycify
from setuptools import Distribution
from setuptools.command.build_ext import build_ext

_MYPY = ["--ignore-missing-imports", "--no-error-summary", "--config-file="]


def main() -> None:
    """Compile, or end with an error."""
    group, *modules = sys.argv[1:]
    extensions = mypycify([*_MYPY, *modules], opt_level="3", debug_level="0", group_name=group)
    command = build_ext(Distribution({"name": group, "ext_modules": extensions}))
    command.inplace = True
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main()

"""`compile_modules.py GROUP SOURCE ...`: compile in place, in this folder: .py by mypyc, and .c.

A process of its own, since mypyc goes by the working directory, and setuptools by `sys.argv`.
"""

from __future__ import annotations

import sys

from mypyc.build import mypycify
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

_MYPY = ["--ignore-missing-imports", "--no-error-summary", "--config-file="]


def main() -> None:
    """Compile, or end with an error."""
    group, *sources = sys.argv[1:]
    modules = [source for source in sources if source.endswith(".py")]
    in_c = [source for source in sources if source.endswith(".c")]
    extensions = mypycify([*_MYPY, *modules], opt_level="3", debug_level="0", group_name=group)
    extensions += [
        Extension(source.removesuffix(".c").replace("/", "."), [source], extra_compile_args=["-O3"])
        for source in in_c
    ]
    command = build_ext(Distribution({"name": group, "ext_modules": extensions}))
    command.inplace = True
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    main()

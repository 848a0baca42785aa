"""`wire/_take_apart.c` as a module, compiled by this machine's compiler."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "dstack_mesh" / "wire" / "_take_apart.c"
STRICT = ("-O2", "-Wall", "-Wextra", "-Werror")
SANITIZED = (*STRICT, "-g", "-fsanitize=undefined,bounds", "-fno-sanitize-recover=all")


class CannotBuildError(Exception):
    """Something to build with is missing; the message says what."""


def build(folder: Path, flags: tuple[str, ...]) -> Any:
    """Compile into `folder`, and give the module. Raises `CannotBuildError`."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotBuildError("there is no C compiler (cc)")
    headers = sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").exists():
        raise CannotBuildError(f"there is no {headers}/Python.h")
    library = folder / "_take_apart.so"
    command = [compiler, "-shared", "-fPIC", *flags, "-isystem", headers, "-o", library, SOURCE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        missing = [line for line in done.stderr.splitlines() if "cannot find" in line]
        if missing:  # as the sanitizer's library
            raise CannotBuildError(missing[0])
        raise AssertionError(done.stderr)
    loader = ExtensionFileLoader("_take_apart", str(library))
    spec = importlib.util.spec_from_file_location("_take_apart", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@cache
def module_or_none() -> Any:
    """Give the module; None on a machine that cannot build it."""
    folder = Path(mkdtemp(prefix="take-apart-"))
    try:
        return build(folder, STRICT)
    except CannotBuildError:
        return None
    finally:
        shutil.rmtree(folder)  # what is loaded stays

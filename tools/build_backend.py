"""The build backend: hatchling's, and wheels with the data plane compiled where that is possible.

mypyc turns the modules of `COMPILED` to C. Where there is no C compiler or no Python.h, or
`DSTACK_MESH_PURE=1` is set, the wheel is pure Python, which is slower and otherwise the same.
Editable installs are always pure. See docs/adr/0007-compiled-data-plane.md.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling import build as hatchling
from hatchling.build import (
    build_editable as build_editable,
)
from hatchling.build import (
    build_sdist as build_sdist,
)
from hatchling.build import (
    get_requires_for_build_editable as get_requires_for_build_editable,
)
from hatchling.build import (
    get_requires_for_build_sdist as get_requires_for_build_sdist,
)

COMPILED = (
    "dstack_mesh/wire/*.py",
    "dstack_mesh/wire/*.c",
    "dstack_mesh/relay/*.py",
    "dstack_mesh/policy/*.py",
    "dstack_mesh/identity/peers.py",
    "dstack_mesh/identity/store.py",
    "dstack_mesh/inbound/auth_service.py",
    "dstack_mesh/inbound/terminator.py",
    "dstack_mesh/ops/admin.py",
    "dstack_mesh/outbound/connect.py",
    "dstack_mesh/outbound/proxy.py",
)
"""What a request passes through, and what is called for each.

No module with a class whose annotations are read while it runs (msgspec.Struct): mypyc makes all of
them `type`.
"""

GROUP = "dstack_mesh"
"""All modules are one library, `GROUP__mypyc`, so that calls between them are calls of C."""

# msgspec: so that its classes' types are known to mypy.
_COMPILERS = ["mypy>=1.14", "setuptools>=70", "msgspec>=0.19"]
_OUT = Path("build/compiled")
_STAMP = _OUT / "stamp"
_TOOLS = (Path("tools/build_backend.py"), Path("tools/compile_modules.py"))


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 517: hatchling's, and mypyc where there is something to compile with."""
    required = list(hatchling.get_requires_for_build_wheel(config_settings))
    return [*required, *_COMPILERS] if _can_compile() else required


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """See PEP 517. The hook in tools/build_hook.py puts what is compiled into the wheel."""
    if not _can_compile():
        shutil.rmtree(_OUT, ignore_errors=True)
    elif not _is_compiled():
        _compile()
    return str(hatchling.build_wheel(wheel_directory, config_settings, metadata_directory))


def _can_compile() -> bool:
    """Tell whether to compile; where something is missing, say what."""
    if os.environ.get("DSTACK_MESH_PURE", "") not in ("", "0"):
        return False
    compiler = (os.environ.get("CC") or "cc").split()[0]
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if shutil.which(compiler) is None:
        missing = f"no C compiler ({compiler})"
    elif not header.exists():
        missing = f"no {header} (Debian: python3-dev)"
    else:
        return True
    print(f"{missing}: the wheel will be pure Python, and slower", file=sys.stderr)
    return False


def _compile() -> None:
    """Compile in a process of its own, in a copy of the sources, into `_OUT`.

    A failure ends the build: a wheel that is silently five times slower helps nobody.
    """
    shutil.rmtree(_OUT, ignore_errors=True)
    sources = _OUT / "src"
    shutil.copytree("src", sources, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    modules = sorted(
        str(path.relative_to(sources))
        for pattern in COMPILED
        for path in sources.glob(pattern)
        if path.name != "__init__.py"
    )
    command = [sys.executable, str(Path(__file__).with_name("compile_modules.py").resolve())]
    subprocess.run([*command, GROUP, *modules], cwd=sources, check=True)  # noqa: S603 - our own
    _STAMP.write_text(_digest())


def _is_compiled() -> bool:
    """Tell whether these very sources were compiled: pip builds a wheel twice to know its name."""
    return _STAMP.exists() and _STAMP.read_text() == _digest()


def _digest() -> str:
    found = hashlib.sha256(f"{sys.version} {platform.platform()}".encode())
    for path in sorted([*Path("src").rglob("*.py"), *Path("src").rglob("*.c"), *_TOOLS]):
        found.update(path.read_bytes())
    return found.hexdigest()

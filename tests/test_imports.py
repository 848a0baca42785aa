"""The architecture's rules on who may import whom, held against the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dstack_mesh"
SOURCE = ROOT / "src" / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    {"", "model", "errors", "log", "log_limit", "gateway_domain", "listen", "memory"},
    {"wire", "identity", "policy", "settings"},
    {"relay", "dstack"},
    {"outbound", "inbound"},
    {"ops"},
    {"lifecycle", "reload", "bindings"},
    {"workers"},
    {"sidecar"},
    {"app"},
    {"demo", "check"},
    {"cli", "__main__", "image"},
)
"""A part imports from its own layer and from those before it. `sim` stands beside them."""

PURE = (
    "wire/",
    "identity/chain.py",
    "identity/escaped_pem.py",
    "identity/extension.py",
    "identity/leaf.py",
    "policy/",
    "outbound/target.py",
)
IMPURE_MODULES = {"asyncio", "ssl", "socket"}

SIM_MAY_USE = {"sim", *LAYERS[0], "identity"}

LONGEST = 400


def _module(file: Path) -> str:
    """Give the module's name below the package: `wire.body`, and `wire` for its `__init__`."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(module: str) -> str:
    return module.partition(".")[0]


def _imported(file: Path) -> set[str]:
    """Give all that `file` imports, absolute; imports for type checking alone do not count."""
    tree = ast.parse(file.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(str(node.module))
    return found


MODULES = {_module(file) for file in FILES}
OURS = {
    _module(file): {
        name.removeprefix(f"{PACKAGE}.")
        for name in _imported(file)
        if name.startswith(f"{PACKAGE}.") and name.removeprefix(f"{PACKAGE}.") in MODULES
    }
    for file in FILES
}


def _layer(module: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if _part(module) in parts)


def test_every_part_has_its_layer() -> None:
    assert {_part(module) for module in OURS} <= set.union(*LAYERS, {"sim"})


@pytest.mark.parametrize("module", sorted(OURS))
def test_imports_point_one_way(module: str) -> None:
    uses = OURS[module]
    if _part(module) == "sim":
        assert {_part(used) for used in uses} <= SIM_MAY_USE
        return
    if _part(module) not in {"demo", "cli"}:
        assert "sim" not in {_part(used) for used in uses}
    upward = {u for u in uses if _part(u) != "sim" and _layer(u) > _layer(module)}
    assert not upward


def test_there_are_no_cycles() -> None:
    # A package's own `__init__` is run before its modules, but imports none of what imports it.
    TopologicalSorter(OURS).prepare()


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if str(file.relative_to(SOURCE)).startswith(PURE)],
    ids=_module,
)
def test_pure_modules_do_no_input_or_output(file: Path) -> None:
    assert not {name.partition(".")[0] for name in _imported(file)} & IMPURE_MODULES


def _does_something(file: Path) -> bool:
    """Tell whether `file` is more than a docstring, imports, constants and interfaces."""
    passive = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    for node in ast.parse(file.read_text()).body:
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        interface = isinstance(node, ast.ClassDef) and any(
            ast.unparse(base).startswith("Protocol") for base in node.bases
        )
        if not (isinstance(node, passive) or for_types or interface):
            return True
    return False


@pytest.mark.parametrize("file", list(filter(_does_something, FILES)), ids=_module)
def test_every_source_file_has_its_test_file(file: Path) -> None:
    below = file.relative_to(SOURCE)
    if file.name == "__main__.py":
        below = Path("cli/__init__.py")  # two lines that its tests run
    name = below.parent.name if below.name == "__init__.py" else below.stem
    assert (ROOT / "tests" / below.parent / f"test_{name}.py").exists()


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST


@pytest.mark.skipif(not (SOURCE / "app.py").exists(), reason="there is no app.py yet")
def test_the_sidecar_imports_only_what_it_needs() -> None:
    code = f"import sys, {PACKAGE}.app; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    loaded = set(ran.stdout.split())
    assert "dstack_mesh.app" in loaded
    assert not {"rich", "httpx2", f"{PACKAGE}.sim"} & loaded

"""What mypyc would compile into something else than what is written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def compiled() -> list[Path]:
    text = (ROOT / "tools" / "build_backend.py").read_text()
    tree = ast.parse(text)
    (patterns,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILED"
    ]
    return sorted(path for pattern in patterns for path in (ROOT / "src").glob(pattern))


FILES = [path for path in compiled() if path.suffix == ".py" and path.name != "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_name_is_for_exceptions_of_one_type(file: Path) -> None:
    """A local variable has one type when compiled: the second of two kinds would be a TypeError."""
    for function in ast.walk(ast.parse(file.read_text())):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        types: dict[str, set[str]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.ExceptHandler) and node.name and node.type:
                types.setdefault(node.name, set()).add(ast.unparse(node.type))
        mixed = {name: found for name, found in types.items() if len(found) > 1}
        assert not mixed, (function.name, mixed)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_no_class_is_read_by_its_annotations(file: Path) -> None:
    """Compiled classes keep no annotations that msgspec could go by."""
    bases = [
        ast.unparse(base)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    assert not [base for base in bases if base.endswith(("Struct", "NamedTuple", "TypedDict"))]


def test_something_is_compiled() -> None:
    assert len(FILES) > 20

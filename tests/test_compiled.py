"""What may be compiled: see tools/build_backend.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"


def compiled() -> list[Path]:
    text = (ROOT / "tools" / "build_backend.py").read_text()
    (names,) = re.findall(r"^COMPILED = (\(.*?^\))", text, re.MULTILINE | re.DOTALL)
    patterns = ast.literal_eval(names)
    return [path for pattern in patterns for path in SOURCE.glob(pattern) if path.suffix == ".py"]


def test_no_structs() -> None:
    """mypyc turns their annotations to `type`, and msgspec then refuses every message."""
    files = compiled()
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not [base for base in node.bases if "Struct" in ast.unparse(base)], file

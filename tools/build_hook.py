"""Hatchling's hook: puts compiled modules, where there are any, beside their sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling names it so
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add what tools/build_backend.py has compiled."""
        root = Path(self.root, "build/compiled/src")
        libraries = sorted(root.rglob("*.so")) if version != "editable" else []
        libraries = [path for path in libraries if path.relative_to(root).parts[0] != "build"]
        if libraries:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["force_include"].update(
                {str(path): str(path.relative_to(root)) for path in libraries}
            )

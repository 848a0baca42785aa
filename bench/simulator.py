"""The simulator in a process of its own, so that it costs the subject nothing."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.process import running


@contextlib.contextmanager
def simulator(apps: str) -> Iterator[dict[str, Any]]:
    """Run `dstack-mesh sim`; give its description of the world."""
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as directory:
        world = str(Path(directory) / "world")
        command = [sys.executable, "-m", "dstack_mesh", "sim", "--apps", apps, "--json"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with running([*command, "--dir", world], "load", **options) as process:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())

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


@contextlib.contextmanager
def simulator(apps: str) -> Iterator[dict[str, Any]]:
    """Run `dstack-mesh sim`; give its description of the world."""
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as directory:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dstack_mesh",
                "sim",
                "--apps",
                apps,
                "--json",
                "--dir",
                str(Path(directory) / "world"),
            ],
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()

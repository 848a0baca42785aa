"""A sidecar as a process of its own, run by the interpreter that `BENCH_PYTHON` names."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.cores import Role
from bench.process import Process, eventually, running

__all__ = ["Build", "Process", "build", "python", "sidecar"]

_START_SECONDS = 20.0
_LAST_WORDS = 500

Build = dict[str, str]
"""What the subject is: `code` is `compiled` or `pure`, the rest are versions by name."""

_DESCRIBE = """
import json, platform, ssl, sys
import dstack_mesh.relay.exchange as hot
import dstack_mesh, uvloop
compiled = hot.__file__.endswith(".so")
print(json.dumps({
    "dstack-mesh": dstack_mesh.__version__, "code": "compiled" if compiled else "pure",
    "Python": platform.python_version(), "uvloop": uvloop.__version__,
    "OpenSSL of Python": ssl.OPENSSL_VERSION,
}))
"""


def python() -> str:
    """The interpreter that runs the subject."""
    return os.environ.get("BENCH_PYTHON") or sys.executable


def build() -> Build:
    """Ask that interpreter which dstack-mesh it runs, and whether its hot modules are compiled."""
    done = subprocess.run([python(), "-c", _DESCRIBE], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"BENCH_PYTHON {python()} can't import dstack_mesh: {''.join(last)}")
    return dict(json.loads(done.stdout))


@contextlib.contextmanager
def sidecar(env: Mapping[str, str], role: Role = None) -> Iterator[Process]:
    """Run `dstack-mesh run` with these settings until the block ends."""
    with tempfile.TemporaryDirectory() as directory:
        ready, log = Path(directory) / "ready", Path(directory) / "log"
        started = time.monotonic()
        command = [python(), "-m", "dstack_mesh", "run", "--ready-file", str(ready)]
        # The harness's own environment has settings only by accident.
        ours = ("MESH_", "DSTACK_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        with (
            log.open("wb") as out,
            running(command, role, env={**clean, **env}, stderr=out) as process,
        ):

            def is_ready() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"the sidecar ended at its start: {_end_of(log)}")
                return ready.exists()

            eventually(is_ready, _START_SECONDS, f"the sidecar is not ready: {_end_of(log)}")
            seconds = time.monotonic() - started
            yield Process([process.pid], json.loads(ready.read_text()), seconds)


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-_LAST_WORDS:].strip()

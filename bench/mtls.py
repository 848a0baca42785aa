"""The harness's end of `bench/mtls_client.py`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bench.credentials import Files
from bench.process import running
from bench.wrk import FailedRequestsError


class Clients:
    """A process that holds connections to one address."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def do(self, what: str, **arguments: object) -> dict[str, Any]:
        """Have something done, and wait. Raises `FailedRequestsError`."""
        assert self._process.stdin is not None
        line = json.dumps({"do": what, **arguments}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it says why below
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            last = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            raise FailedRequestsError(f"the load over TLS failed: {''.join(last[-1:])}")
        return dict(json.loads(line))


@contextlib.contextmanager
def clients(
    address: str, connections: int, files: Files | None, headers: Sequence[str] = ()
) -> Iterator[Clients]:
    """Open connections to `address`, over mutual TLS where there are `files`."""
    spec: dict[str, object] = {"address": address, "connections": connections}
    spec["headers"] = list(headers)
    if files is not None:
        spec |= {"cert": str(files.cert), "key": str(files.key), "root": str(files.root)}
    command = [sys.executable, "-m", "bench.mtls_client", json.dumps(spec)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with running(command, "load", **pipes) as process:
        held = Clients(process)
        held.answer()
        yield held

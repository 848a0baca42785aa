"""wrk: as many requests as go through, over plain HTTP."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cores import LAYOUT
from bench.tools import path

LUA = Path(__file__).parent / "lua"

_DONE = re.compile(r"(\d+) requests in ([\d.]+)(us|ms|s|m|h),")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_END_SECONDS = 20.0


class FailedRequestsError(Exception):
    """Some requests of a run failed: whatever it measured is not what was to be measured."""


@dataclass(frozen=True)
class Load:
    """What was done in a run."""

    requests: int
    seconds: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def run(
    url: str,
    *,
    connections: int,
    seconds: float,
    headers: Sequence[str] = (),
    script: str | None = None,
    arguments: Sequence[str] = (),
) -> Load:
    """Ask over and over for `seconds`, which may be a part of one. Raises `FailedRequestsError`.

    `script` is a file in `bench/lua`, and `arguments` are what it gets.
    """
    # It takes whole seconds only, but ends in good order on SIGINT.
    command = [path("wrk"), "-t1", f"-c{connections}", "-d600", "--timeout", "20s"]
    for header in headers:
        command += ["-H", header]
    if script is not None:
        command += ["-s", str(LUA / script)]
    command += [url, *(["--", *arguments] if arguments else [])]
    process = subprocess.Popen(
        LAYOUT.pin(command, "load"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=_END_SECONDS)[0]
    finally:
        process.kill()
        process.wait()
    return parse(output)


def parse(output: str) -> Load:
    """Read what wrk printed. Raises `FailedRequestsError` where any request failed."""
    match = _DONE.search(output)
    if match is None or "Non-2xx" in output or "Socket errors" in output or match[1] == "0":
        raise FailedRequestsError(f"wrk: {output.strip()[-600:]}")
    return Load(int(match[1]), float(match[2]) * _SECONDS[match[3]])

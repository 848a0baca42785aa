"""h2load: requests at a fixed rate, each with the time that it took."""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.cores import LAYOUT
from bench.tools import path
from bench.wrk import FailedRequestsError

CLIENTS = 50
"""Connections that share the rate. h2load's timer for one of them has steps of 10 ms."""

_SHARE = 0.98
"""How much of the rate has to be reached for the run to count: else it was saturated."""


def run(url: str, *, rate: int, seconds: float, headers: Sequence[str] = ()) -> list[float]:
    """Ask `rate` times a second for `seconds`; give the milliseconds of each answer, sorted.

    Raises `FailedRequestsError` where any answer is not 200, or the rate was not reached.
    """
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as directory:
        log = Path(directory) / "log"
        command = [path("h2load"), "--h1", f"-c{CLIENTS}", f"--rps={rate // CLIENTS}"]
        command += ["-D", f"{round(seconds * 1000)}ms", f"--log-file={log}"]
        for header in headers:
            command += ["-H", header]
        done = subprocess.run(
            LAYOUT.pin([*command, url], "load"), capture_output=True, text=True, timeout=60
        )
        if done.returncode or not log.exists():
            raise FailedRequestsError(f"h2load: {(done.stdout + done.stderr).strip()[-600:]}")
        times = parse_log(log.read_text())
    wanted = rate * seconds
    if len(times) < wanted * _SHARE:
        raise FailedRequestsError(
            f"h2load: {len(times)} answers instead of {wanted:.0f}: {rate} requests a second are"
            " more than goes through; give a lower --rate"
        )
    return times


def parse_log(text: str) -> list[float]:
    """Read `--log-file`: start in µs since 1970, status, µs until the answer's end, by tabs.

    Gives milliseconds, sorted. Raises `FailedRequestsError` where a status is not 200.
    """
    times = []
    for line in text.splitlines():
        _, status, micros, *_ = line.split("\t")
        if status != "200":
            raise FailedRequestsError(f"h2load: an answer had the status {status}")
        times.append(int(micros) / 1000)
    return sorted(times)


def quantile(ordered: Iterable[float], share: float) -> float:
    """Give the smallest value that `share` of all values do not exceed (nearest rank)."""
    values = list(ordered)
    return values[max(0, math.ceil(share * len(values)) - 1)]

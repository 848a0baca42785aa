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

PER_CLIENT = 100
"""Requests a second of one connection. h2load gives each a timer of its own, of 10 ms or more."""

_STEP_MS = 11
"""From one connection's start to the next: all at once they would ask in bursts."""

SHARE = 0.95
"""How much of the rate has to be reached for the run to count: else it was saturated."""


def run(
    url: str, *, rate: int, seconds: float, headers: Sequence[str] = (), share: float = SHARE
) -> list[float]:
    """Ask `rate` times a second for `seconds`; give the milliseconds of each answer, sorted.

    Raises `FailedRequestsError` where an answer is not 200, or not `share` of the rate was reached.
    """
    connections = max(1, rate // PER_CLIENT)
    ramp = connections * _STEP_MS / 1000
    total = connections * round(PER_CLIENT * (seconds + ramp))
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as directory:
        log = Path(directory) / "log"
        command = [path("h2load"), "--h1", f"-c{connections}", f"-n{total}"]
        command += [
            f"--rps={PER_CLIENT}",
            "-r1",
            f"--rate-period={_STEP_MS}ms",
            f"--log-file={log}",
        ]
        for header in headers:
            command += ["-H", header]
        done = subprocess.run(
            LAYOUT.pin([*command, url], "load"), capture_output=True, text=True, timeout=60
        )
        if done.returncode or not log.exists():
            raise FailedRequestsError(f"h2load: {(done.stdout + done.stderr).strip()[-600:]}")
        times = steady(parse_log(log.read_text()), ramp, seconds)
    wanted = rate * seconds
    if not times or len(times) < wanted * share:
        raise FailedRequestsError(
            f"h2load: {len(times)} answers instead of {wanted:.0f}: {rate} requests a second are"
            " more than goes through now; try it on a quiet machine, or with a lower --rate"
        )
    return times


def parse_log(text: str) -> list[tuple[int, int]]:
    """Read `--log-file`: start in µs since 1970, status, µs until the answer's end, by tabs.

    Gives start and time. Raises `FailedRequestsError` where a status is not 200.
    """
    rows = []
    for line in text.splitlines():
        start, status, micros, *_ = line.split("\t")
        if status != "200":
            raise FailedRequestsError(f"h2load: an answer had the status {status}")
        rows.append((int(start), int(micros)))
    return rows


def steady(rows: Sequence[tuple[int, int]], ramp: float, seconds: float) -> list[float]:
    """Give the milliseconds of what was asked while all connections were there, sorted."""
    begin = min((start for start, _ in rows), default=0) + ramp * 1e6
    end = begin + seconds * 1e6
    return sorted(micros / 1000 for start, micros in rows if begin <= start < end)


def quantile(ordered: Iterable[float], share: float) -> float:
    """Give the smallest value that `share` of all values do not exceed (nearest rank)."""
    values = list(ordered)
    return values[max(0, math.ceil(share * len(values)) - 1)]

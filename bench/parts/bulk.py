"""Bodies of 100 MB each way in both directions, and memory while 512 MB pass through."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from bench.contestants import (
    Contestant,
    all_outbound,
    inbound,
    nginx_inbound,
    nginx_outbound,
    outbound,
)
from bench.cores import LAYOUT
from bench.credentials import Files
from bench.origin import SIZES, Origin, origin
from bench.plan import Found, Plan
from bench.race import Readings, Row, Subject, race
from bench.tools import path
from bench.turns import Meter
from bench.wrk import FailedRequestsError

_SECONDS = 120


def bodies(plan: Plan) -> Found:
    """100 MB down and up."""
    rows: list[Row] = []
    size = "1m" if plan.short else "100m"
    with origin() as made:
        with (
            all_outbound(made, made.tls) as contestants,
            nginx_outbound(made, made.tls, tuned=False) as untuned,
        ):
            rows += _both_ways("outbound", [*contestants, untuned], None, made, size, plan)
        with (
            inbound(made) as mesh,
            nginx_inbound(made) as peer,
            nginx_inbound(made, tuned=False) as untuned,
        ):
            rows += _both_ways("inbound", [mesh, peer, untuned], made.caller, made, size, plan)
    return Found("Large bodies", rows)


def _both_ways(
    direction: str,
    contestants: Sequence[Contestant],
    files: Files | None,
    made: Origin,
    size: str,
    plan: Plan,
) -> list[Row]:
    rows: list[Row] = []
    for way in ("down", "up"):

        def subject(one: Contestant, way: str = way) -> Subject:
            def turn() -> Readings:
                with Meter(one.process) as meter:
                    transfer(one, way, size, made, files)
                return {"cpu_ms_100mb": meter.cpu * 1e3 * 100_000_000 / SIZES[size]}

            return Subject(one.name, turn)

        scenario = f"{direction}, 100 MB {way}"
        rows += race(scenario, [subject(one) for one in contestants], plan.rounds)
    return rows


def memory(plan: Plan) -> Found:
    """512 MB through, in each direction and way."""
    rows: list[Row] = []
    size = "1m" if plan.short else "512m"
    with origin() as made:
        with outbound(made, made.tls) as mesh, nginx_outbound(made, made.tls) as peer:
            rows += _growth("outbound", [mesh, peer], None, made, size)
        with inbound(made) as mesh, nginx_inbound(made) as peer:
            rows += _growth("inbound", [mesh, peer], made.caller, made, size)
    return Found("Memory while 512 MB pass through", rows)


def _growth(
    direction: str,
    contestants: Sequence[Contestant],
    files: Files | None,
    made: Origin,
    size: str,
) -> list[Row]:
    rows = []
    for way in ("down", "up"):
        values = {}
        for one in contestants:
            transfer(one, way, "16k", made, files)  # what a first request loads stays
            idle = one.process.rss_mb()
            one.process.forget_peak()
            transfer(one, way, size, made, files)
            values[one.name] = [max(0.0, one.process.peak_mb() - idle)]
        rows.append(Row(f"{direction}, 512 MB {way}", "growth_mb", values))
    return rows


def transfer(one: Contestant, way: str, size: str, made: Origin, files: Files | None) -> None:
    """Have curl carry one body. Raises `FailedRequestsError` where it did not arrive whole."""
    scheme = "http" if files is None else "https"
    target = f"{scheme}://{one.address}/{'sink' if way == 'up' else size}"
    command = [path("curl"), "-sS", "--fail", "--max-time", str(_SECONDS), target]
    for header in (*one.headers, "Expect:"):
        command += ["-H", header]
    if files is not None:  # the mesh's certificates name no address
        command += ["-k", "--cert", str(files.cert), "--key", str(files.key)]
    if way == "up":
        command += ["-X", "POST", "-T", str(made.directory / "files" / size)]
    else:
        command += ["-o", "/dev/null", "-w", "%{size_download}"]
    done = subprocess.run(
        LAYOUT.pin(command, "load"), capture_output=True, text=True, timeout=_SECONDS + 10
    )
    if done.returncode or done.stdout != str(SIZES[size]):
        raise FailedRequestsError(
            f"curl, {SIZES[size]} bytes {way} through {one.name}: {done.stdout!r} {done.stderr}"
        )

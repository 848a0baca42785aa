"""wrk: as many requests as go through, over plain HTTP."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.cores import LAYOUT
from bench.tools import path

LUA = Path(__file__).parent / "lua"

_DONE = re.compile(r"(\d+) requests in ")
_END_SECONDS = 20.0


class FailedRequestsError(Exception):
    """Some requests of a run failed: whatever it measured is not what was to be measured."""


@contextlib.contextmanager
def running(
    url: str,
    *,
    connections: int,
    headers: Sequence[str] = (),
    script: str | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[None]:
    """Ask over and over until the block ends. Raises `FailedRequestsError` then.

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
        yield
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=_END_SECONDS)[0]
    finally:
        process.kill()
        process.communicate()
    parse(output)


def parse(output: str) -> int:
    """Give how many requests wrk counted. Raises `FailedRequestsError` where any of them failed."""
    match = _DONE.search(output)
    if match is None or "Non-2xx" in output or "Socket errors" in output or match[1] == "0":
        raise FailedRequestsError(f"wrk: {output.strip()[-600:]}")
    return int(match[1])

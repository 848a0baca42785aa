"""Runs libFuzzer on one target, in a process of its own, and reads what it says."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.targets import CORPUS, FINDINGS, ROOT, WORK, Target

_DICTIONARY = ROOT / "fuzz" / "http.dict"
_SLOWEST_SECONDS = 20  # one input; what takes so long has found a way to make the mesh slow
_MEMORY_MB = 2048
_executed = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.MULTILINE)
_progress = re.compile(r"^#\d+\s+(?:INITED|pulse|DONE)")


@dataclass(frozen=True)
class Outcome:
    """What one run of the fuzzer came to."""

    executions: int
    per_second: int
    findings: list[Path]
    failed: bool
    """Whether it ended otherwise than with all its executions done."""


def fuzz(target: Target, *, runs: int, seconds: int, seed: int) -> Outcome:
    """Fuzz until `runs` executions or `seconds` (0: no limit) are over, or something is found."""
    folder = WORK / target.name
    for made in (folder, FINDINGS, CORPUS / target.name):
        made.mkdir(parents=True, exist_ok=True)
    _plant(target, folder)
    before = set(FINDINGS.glob(f"{target.name}-*"))  # others may be at work beside this
    command = [
        *(sys.executable, "-m", "fuzz.child", target.name),
        *(str(folder), str(CORPUS / target.name)),
        f"-runs={runs}",
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={target.max_length}",
        f"-dict={_DICTIONARY}",
        f"-timeout={_SLOWEST_SECONDS}",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-artifact_prefix={FINDINGS / target.name}-",
        "-print_final_stats=1",
    ]
    began = time.monotonic()
    log = WORK / f"{target.name}.log"
    with log.open("w") as file, subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        said = []
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            said.append(line)
            if _progress.match(line):
                print(line.rstrip(), flush=True)
    seconds_taken = time.monotonic() - began
    text = "".join(said)
    failed = process.returncode != 0
    if failed:
        print("".join(_worth_showing(text)), flush=True)
    findings = sorted(set(FINDINGS.glob(f"{target.name}-*")) - before)
    executed = _executed.search(text)
    executions = int(executed[1]) if executed else 0
    return Outcome(executions, round(executions / seconds_taken), findings, failed)


def _plant(target: Target, folder: Path) -> None:
    """Write the target's seeds where libFuzzer reads them."""
    _, seeds = target.load()
    for seed in seeds:
        (folder / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)


def _worth_showing(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if "Uncaught" in line or "ERROR" in line), -20)
    yield from lines[start:][:60]

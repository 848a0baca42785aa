"""The corpus: what is run by its inputs, and which of them are worth keeping."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.targets import CORPUS, ROOT, Target

MAX_FILES = 60
MAX_BYTES = 100_000

Arc = tuple[str, int, int]


def arcs_of(target: Target, inputs: Iterable[bytes]) -> dict[bytes, frozenset[Arc]]:
    """Give what each input runs in the target's modules: steps from line to line."""
    run, _ = target.load()
    files = {str(path) for path in _files(target)}
    found = {}
    for data in inputs:
        seen: set[Arc] = set()
        before = sys.gettrace()
        sys.settrace(_tracer(files, seen))
        try:
            run(data)
        finally:
            sys.settrace(before)
        found[data] = frozenset(seen)
    return found


def _tracer(files: set[str], seen: set[Arc]) -> Any:
    def call(frame: FrameType, _: str, __: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in files:
            return None
        last = -frame.f_code.co_firstlineno

        def line(inner: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            at = -1 if event == "return" else inner.f_lineno
            seen.add((name, last, at))
            last = at
            return line

        return line

    return call


def _files(target: Target) -> list[Path]:
    specs = [importlib.util.find_spec(f"dstack_mesh.{module}") for module in target.about]
    return [Path(spec.origin) for spec in specs if spec is not None and spec.origin]


def smallest(arcs: dict[bytes, frozenset[Arc]]) -> list[bytes]:
    """Choose few and short inputs that together run all that all of them run."""
    kept: list[bytes] = []
    size = 0
    rest = dict(arcs)
    left = set().union(*arcs.values()) if arcs else set()
    while left and rest and len(kept) < MAX_FILES:
        best = max(rest, key=lambda data: (len(rest[data] & left), -len(data), data))
        if not rest[best] & left:
            break
        left -= rest.pop(best)
        if size + len(best) <= MAX_BYTES:
            kept.append(best)
            size += len(best)
    # What is left of the room is for short inputs that go a way of their own.
    ways = {arcs[data] for data in kept}
    for data in sorted(rest, key=lambda data: (len(data), data)):
        if len(kept) < MAX_FILES and size + len(data) <= MAX_BYTES and rest[data] not in ways:
            ways.add(rest[data])
            kept.append(data)
            size += len(data)
    return kept


def merge(target: Target) -> tuple[int, int]:
    """Rewrite the committed corpus with the best of all; give its files and bytes."""
    _, seeds = target.load()
    paths = (*target.committed(), *target.found())
    inputs = {*seeds, *(path.read_bytes() for path in paths)}
    kept = smallest(arcs_of(target, sorted(inputs)))
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    for path in target.committed():
        path.unlink()
    for data in kept:
        name = hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16]
        (folder / name).write_bytes(data)
    return len(kept), sum(map(len, kept))


def measured(target: Target) -> dict[str, list[int]]:
    """Replay everything in a process of its own; give lines and branches as [run, there are]."""
    command = [sys.executable, "-m", "fuzz.corpus", target.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(target: Target) -> dict[str, list[int]]:
    import coverage

    measuring = coverage.Coverage(
        data_file=None, branch=True, include=[str(p) for p in _files(target)], config_file=False
    )
    measuring.exclude(r"if TYPE_CHECKING:")
    measuring.exclude(r"^\s*\.\.\.$")
    measuring.start()
    run, seeds = target.load()
    inputs = [path.read_bytes() for path in (*target.committed(), *target.found())]
    for data in (*seeds, *inputs):
        with contextlib.suppress(Exception):  # a finding, which is told elsewhere
            run(data)
    measuring.stop()
    report = ROOT / "build" / "fuzz" / f"{target.name}.coverage.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    measuring.json_report(outfile=str(report))
    totals = json.loads(report.read_text())["totals"]
    return {
        "lines": [totals["covered_lines"], totals["num_statements"]],
        "branches": [totals["covered_branches"], totals["num_branches"]],
    }


if __name__ == "__main__":
    from fuzz.targets import TARGETS

    print(json.dumps(_measure(TARGETS[sys.argv[1]])))

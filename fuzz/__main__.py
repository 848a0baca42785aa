"""`make fuzz`, or `python -m fuzz [TARGET …]`: fuzz targets in turn and say what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fuzz import corpus, fuzzer
from fuzz.targets import ROOT, TARGETS, Target

RUNS = 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"executions of each ({RUNS})")
    parser.add_argument("--seconds", type=int, default=0, help="for each; 0, the default: no limit")
    parser.add_argument("--seed", type=int, help="of the fuzzer's dice; a new one each time")
    parser.add_argument("--merge", action="store_true", help="keep the best inputs in fuzz/corpus")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input on one target")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]}; there are {', '.join(TARGETS)}")
    chosen = [TARGETS[name] for name in arguments.targets or TARGETS]
    if arguments.replay is not None:
        if len(arguments.targets) != 1:
            parser.error("--replay takes the one target that the input is for")
        run, _ = chosen[0].load()
        run(arguments.replay.read_bytes())
        return 0
    if arguments.merge:
        for target in chosen:
            files, size = corpus.merge(target)
            print(f"{target.name}: {files} inputs, {size} bytes", flush=True)
        return 0
    if importlib.util.find_spec("atheris") is None:
        print(
            "atheris is not installed: it has packages for CPython 3.11 to 3.13 on x86-64 Linux"
            " only, and this is another Python or system",
            file=sys.stderr,
        )
        return 2
    return _fuzz(chosen, arguments)


def _fuzz(chosen: list[Target], arguments: argparse.Namespace) -> int:
    seed = arguments.seed or secrets.randbelow(2**31 - 1) + 1
    table = Table(title=f"fuzzing, seed {seed}")
    for name in ("target", "executions", "per second", "lines", "branches", "findings"):
        table.add_column(name, justify="left" if name in ("target", "findings") else "right")
    found = False
    for target in chosen:
        print(f"== {target.name}", flush=True)
        outcome = fuzzer.fuzz(target, runs=arguments.runs, seconds=arguments.seconds, seed=seed)
        found = found or outcome.failed
        names = "\n".join(str(path.relative_to(ROOT)) for path in outcome.findings)
        table.add_row(
            target.name,
            f"{outcome.executions:,}",
            f"{outcome.per_second:,}",
            *_reached(target),
            names or ("it failed" if outcome.failed else "none"),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 1 if found else 0


def _reached(target: Target) -> list[str]:
    """Say how much of the target's modules all inputs together run."""
    measured = corpus.measured(target)
    return [
        f"{ran} of {there} ({100 * ran / (there or 1):.1f} %)"
        for ran, there in (measured["lines"], measured["branches"])
    ]


if __name__ == "__main__":
    sys.exit(main())

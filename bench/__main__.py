"""`make bench`, or `python -m bench [PART …]`: run the parts and report what they found."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import chart, report, results, tools
from bench.parts.all import PARTS
from bench.plan import Found, Plan
from bench.race import MEASURES, absurd
from bench.sidecar import build, python
from bench.wrk import FailedRequestsError

ROOT = Path(__file__).parent.parent
LATEST = ROOT / "bench" / "results" / "latest.json"
DOCUMENT = ROOT / "docs" / "performance.md"
PUBLISHED = DOCUMENT.with_suffix(".json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Give the exit status: 0 done, 1 a part failed or was absurd, 2 wrong usage or no tools."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.short and options.publish:
        parser.error("--short measures nothing worth to --publish")
    if options.list:
        for part in PARTS.values():
            print(f"{part.name:<16} {part.about}")
        return 0
    if options.render:
        publish(None)
        return 0
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"no part {name}; there are {', '.join(PARTS)}")
    names = options.parts or list(PARTS)
    needed = tools.missing(dict.fromkeys(tool for name in names for tool in PARTS[name].tools))
    if needed:
        print(tools.how_to_install(needed), file=sys.stderr)
        return 2
    plan = Plan(options.short, 1 if options.short else options.rounds, options.rate, options.idle)
    return _run(names, plan, to_publish=options.publish)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="BENCH_PYTHON is the interpreter that runs the sidecars (default: this one).",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all; see --list")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--short", action="store_true", help="only show that the harness works")
    parser.add_argument("--rounds", type=_positive, default=Plan.rounds, help="default %(default)s")
    parser.add_argument(
        "--rate",
        type=_positive,
        default=Plan.rate,
        help="requests a second where latency is measured (default %(default)s; inbound half)",
    )
    parser.add_argument(
        "--idle", type=_positive, default=Plan.idle, help="idle connections (default %(default)s)"
    )
    parser.add_argument(
        "--publish", action="store_true", help="write docs/performance.md, .json and .svg"
    )
    parser.add_argument(
        "--render", action="store_true", help="write them from docs/performance.json as it is"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number


def _run(names: Sequence[str], plan: Plan, *, to_publish: bool) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        subject = build()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"subject: dstack-mesh {subject['dstack-mesh']}, {report.code(subject)}, {python()}")
    found: dict[str, Found] = {}
    failures: list[str] = []
    for name in names:
        began = time.monotonic()
        print(f"\n== {name}", flush=True)
        try:
            found[name] = PARTS[name].run(plan)
        except (FailedRequestsError, RuntimeError, LookupError, OSError) as error:
            failures.append(f"{name}: {error}")
            print(f"failed: {error}", file=sys.stderr)
            continue
        _show(found[name])
        failures += [text for row in found[name].rows if (text := absurd(row))]
        print(f"({time.monotonic() - began:.1f} s)", flush=True)
    new = results.collect(found, subject, plan)
    results.write(LATEST, new)
    if to_publish:
        publish(new)
    for text in failures:
        print(f"error: {text}", file=sys.stderr)
    return 1 if failures else 0


def _show(found: Found) -> None:
    for row in found.rows:
        medians = "  ".join(f"{name} {report.number(row.median(name))}" for name in row.values)
        print(f"{row.scenario + ': ' + MEASURES[row.measure]:<84} {medians}")
    for key, value in found.plain.items():
        print(f"{key:<84} {value}")
    for note in found.notes:
        print(note)


def publish(new: results.Results | None) -> None:
    """Write the documents, from what is published and the new results in its place."""
    old = results.read(PUBLISHED)
    whole = old if new is None else results.merged(old, new)
    if whole is None:
        raise SystemExit(f"{PUBLISHED} is not there: run with --publish first")
    whole["parts"] = {name: whole["parts"][name] for name in PARTS if name in whole["parts"]}
    results.write(PUBLISHED, whole)
    PUBLISHED.with_suffix(".svg").write_text(chart.draw(whole))
    text = report.replace_between_marks(DOCUMENT.read_text(), report.render(whole))
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    sys.exit(main())

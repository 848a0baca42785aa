"""Hold the coverage that the project promises: `coverage_gates.py COVERAGE.json`.

Where a wrong line lets a stranger in, every line and branch is run by a test; of the whole, most.
Exit status 1 names what is missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COMPLETE = (
    "src/dstack_mesh/identity/",
    "src/dstack_mesh/wire/",
    "src/dstack_mesh/policy/",
    "src/dstack_mesh/outbound/target.py",
)
WHOLE = 90.0


def problems(report: dict[str, Any]) -> list[str]:
    """Say what `report` (coverage's JSON, with branches) lacks, a line for each lack."""
    found = []
    if not report["meta"]["branch_coverage"]:
        found.append("branches were not measured")
    for gate in COMPLETE:
        files = {name: data for name, data in report["files"].items() if name.startswith(gate)}
        if not files:
            found.append(f"{gate}: no such file was measured")
        for name, data in files.items():
            found += [f"{name}:{line} is never run" for line in data["missing_lines"]]
            found += [
                f"{name}:{start} never goes on to {f'line {end}' if end > 0 else 'its end'}"
                for start, end in data.get("missing_branches", ())
            ]
    whole = report["totals"]["percent_covered"]
    if whole < WHOLE:
        found.append(f"the whole is covered to {whole:.2f} %, and {WHOLE:g} % is the least")
        weakest = sorted(report["files"].items(), key=lambda f: f[1]["summary"]["percent_covered"])
        found += [f"  {d['summary']['percent_covered']:6.2f} %  {name}" for name, d in weakest[:10]]
    return found


def main() -> int:
    """Judge the report named on the command line."""
    report = json.loads(Path(sys.argv[1]).read_text())
    found = problems(report)
    print("\n".join(found))
    print(f"Coverage: {report['totals']['percent_covered']:.2f} % of the whole,", end=" ")
    print("all gates held" if not found else f"{len(found)} lines above say what is missing")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

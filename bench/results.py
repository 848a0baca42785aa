"""What a run found, as JSON: written, merged and read back."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.plan import Found, Plan
from bench.race import Row
from bench.sidecar import Build

Results = dict[str, Any]
"""`machine`, `plan`, and `parts` by name: each with `title`, `rows`, `notes`, `plain`, `build`
and the `date` of its run."""

_DIGITS = 4


def collect(found: dict[str, Found], build: Build, plan: Plan) -> Results:
    """Put together what the parts of one run found."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parts = {
        name: {
            "title": part.title,
            "build": build,
            "date": today,
            "rounds": plan.rounds,
            "rows": [_row(row) for row in part.rows],
            "notes": part.notes,
            "plain": part.plain,
        }
        for name, part in found.items()
    }
    return {"machine": describe(), "parts": parts}


def _row(row: Row) -> dict[str, Any]:
    values = {name: [_short(value) for value in values] for name, values in row.values.items()}
    return asdict(row) | {"values": values}


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def rows(part: dict[str, Any]) -> list[Row]:
    """Read back the rows of one of `parts`."""
    return [Row(**row) for row in part["rows"]]


def merged(old: Results | None, new: Results) -> Results:
    """Put new parts in the place of old ones; parts of another machine are not kept."""
    if old is None or old["machine"] != new["machine"]:
        return new
    return {"machine": new["machine"], "parts": old["parts"] | new["parts"]}


def write(path: Path, results: Results) -> None:
    """Write them with a line for each row, so that a change can be read in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    path.write_text(_rows_on_lines(text) + "\n")


def _rows_on_lines(text: str) -> str:
    """Join what json spreads over lines where it is a list of numbers."""
    lines: list[str] = []
    joining = False
    for line in text.splitlines():
        if joining:
            lines[-1] += line.strip() if line.strip().startswith("]") else line.strip() + " "
            joining = not line.strip().startswith("]")
        else:
            lines.append(line)
            joining = line.endswith(": [") and '"rows"' not in line and '"notes"' not in line
    return "\n".join(line.replace(" ]", "]") for line in lines)


def read(path: Path) -> Results | None:
    """Read what `write` wrote; None where there is nothing yet."""
    return dict(json.loads(path.read_text())) if path.exists() else None

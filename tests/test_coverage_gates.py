from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "tools" / "coverage_gates.py"
GATES = (
    "src/dstack_mesh/identity/chain.py",
    "src/dstack_mesh/wire/body.py",
    "src/dstack_mesh/policy/allow.py",
    "src/dstack_mesh/outbound/target.py",
)


def _report() -> dict[str, Any]:
    full = {"missing_lines": [], "missing_branches": [], "summary": {"percent_covered": 100.0}}
    return {
        "meta": {"branch_coverage": True},
        "files": {
            **{name: dict(full) for name in GATES},
            "src/dstack_mesh/app.py": {
                "missing_lines": [1],
                "missing_branches": [],
                "summary": {"percent_covered": 80.0},
            },
        },
        "totals": {"percent_covered": 90.0},
    }


def _judge(tmp_path: Path, report: dict[str, Any]) -> tuple[int, str]:
    file = tmp_path / "coverage.json"
    file.write_text(json.dumps(report))
    ran = subprocess.run(
        [sys.executable, SCRIPT, file], capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.stderr == ""
    return ran.returncode, ran.stdout


def test_what_is_promised_passes(tmp_path: Path) -> None:
    status, said = _judge(tmp_path, _report())
    assert (status, "all gates held" in said) == (0, True)


def test_a_line_never_run_is_named(tmp_path: Path) -> None:
    report = _report()
    report["files"][GATES[0]]["missing_lines"] = [7]
    status, said = _judge(tmp_path, report)
    assert (status, f"{GATES[0]}:7 is never run" in said) == (1, True)


def test_a_branch_never_taken_is_named(tmp_path: Path) -> None:
    report = _report()
    report["files"][GATES[3]]["missing_branches"] = [[7, 9], [8, -1]]
    status, said = _judge(tmp_path, report)
    assert status == 1
    assert f"{GATES[3]}:7 never goes on to line 9" in said
    assert f"{GATES[3]}:8 never goes on to its end" in said


def test_the_whole_has_a_least(tmp_path: Path) -> None:
    report = _report()
    report["totals"]["percent_covered"] = 89.99
    status, said = _judge(tmp_path, report)
    assert (status, "89.99 %" in said, "src/dstack_mesh/app.py" in said) == (1, True, True)


def test_a_gate_that_guards_nothing_fails(tmp_path: Path) -> None:
    report = _report()
    del report["files"][GATES[2]]
    report["meta"]["branch_coverage"] = False
    status, said = _judge(tmp_path, report)
    assert status == 1
    assert "src/dstack_mesh/policy/: no such file was measured" in said
    assert "branches were not measured" in said

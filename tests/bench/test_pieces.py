"""Small pieces of `make bench`, for real: the rest is the same with other numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.parts.all import PARTS

from bench import __main__ as command
from bench import tools

ROOT = Path(__file__).parent.parent.parent


def needs(*names: str) -> None:
    missing = tools.missing(names)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(tools.how_to_install(missing))
    if missing:
        pytest.skip(tools.how_to_install(missing))


def bench(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.mark.parametrize(
    ("part", "subjects"),
    [
        ("varied", {"mesh", "nginx", "HAProxy"}),
        ("latency", {"mesh", "nginx", "HAProxy"}),
        ("new-inbound", {"mesh", "nginx", "nginx, no tickets"}),
        ("chain", {"mesh", "nginx"}),
    ],
)
def test_a_short_run_measures_every_subject(
    part: str, subjects: set[str], capfd: pytest.CaptureFixture[str]
) -> None:
    needs(*PARTS[part].tools)

    status = command.main(["--short", part])

    output = capfd.readouterr()
    assert status == 0, output
    assert "pure Python" in output.out or "compiled" in output.out
    found = json.loads(command.LATEST.read_text())["parts"][part]
    assert {name for row in found["rows"] for name in row["values"]} == subjects
    assert all(
        value >= 0 for row in found["rows"] for one in row["values"].values() for value in one
    )


def test_the_parts_are_listed() -> None:
    done = bench("--list")

    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(PARTS)


def test_an_unknown_part_is_refused_with_those_that_there_are() -> None:
    done = bench("small-gat")

    assert done.returncode == 2
    assert "small-gat" in done.stderr
    assert "small-get" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interpreter_without_the_mesh_is_told_with_its_name(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 'no module dstack_mesh' >&2\nexit 1\n")
    other.chmod(0o755)

    done = bench("--short", "startup", BENCH_PYTHON=str(other))

    assert done.returncode == 2
    assert f"{other} can't import dstack_mesh: no module dstack_mesh" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_programs_are_told_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tools, "find", lambda tool: None if tool == "wrk" else "/bin/" + tool)

    assert command.main(["--short", "small-get", "inbound"]) == 2

    error = capsys.readouterr().err
    assert "wrk not found: apt-get install --no-install-recommends wrk" in error

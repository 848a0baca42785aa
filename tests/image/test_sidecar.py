"""What the entry says before it gives up root; what it does then the container tests show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.processes import clean_environ

ENTRY = (sys.executable, "-m", "dstack_mesh.image")


def entry(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command: tuple[str, ...] = (*ENTRY, *args)
    return subprocess.run(
        command,
        env={**clean_environ(), **environ},
        capture_output=True,
        text=True,
        timeout=30,
        cwd="/",
    )


@pytest.mark.parametrize("args", [("run", "--help"), ("dstack-mesh", "run", "--help")])
def test_help(args: tuple[str, ...]) -> None:
    ran = entry(*args)
    assert ran.returncode == 0
    assert ran.stdout.count("Run the sidecar of this CVM") == 1


def test_a_flag_that_is_none() -> None:
    ran = entry("run", "--no-such-flag")
    assert ran.returncode == 2
    assert "No such option" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_wrong_setting() -> None:
    ran = entry(MESH_MAX_CONNECTIONS="many")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "MESH_MAX_CONNECTIONS" in ran.stderr


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    ran = entry("-c", "/no/such/file.toml")
    assert ran.returncode == 2
    assert "/no/such/file.toml" in ran.stderr


@pytest.mark.parametrize("first", ["version", "dstack-mesh version", "--version"])
def test_the_other_commands(first: str) -> None:
    ran = entry(*first.split())
    assert ran.returncode == 0
    assert "dstack-mesh" in ran.stdout


def test_any_other_program() -> None:
    ran = entry("sh", "-c", "echo it ran; exit 3")
    assert (ran.returncode, ran.stdout) == (3, "it ran\n")


def test_no_such_program() -> None:
    ran = entry("no-such-program")
    assert (ran.returncode, ran.stderr) == (
        127,
        "dstack-mesh: no-such-program: No such file or directory\n",
    )

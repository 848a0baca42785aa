"""The unit file that the documents give, held by systemd's own reader."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dstack_mesh.settings.load import load_settings

UNIT = Path(__file__).parent.parent / "docs" / "dstack-mesh.service"


class _Unit(configparser.RawConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr


@pytest.fixture
def service() -> configparser.SectionProxy:
    unit = _Unit(strict=False)
    unit.read(UNIT)
    return unit["Service"]


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is not installed; CI has to have it")
        pytest.skip("systemd-analyze is not installed")
    return found


def _verify(analyze: str, path: Path) -> str:
    ran = subprocess.run(
        [analyze, "verify", "--man=no", str(path)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    # Of this unit alone: a machine's own units may have faults of theirs.
    return "".join(line for line in ran.stderr.splitlines(True) if path.name in line)


def _elsewhere(tmp_path: Path, text: str) -> Path:
    path = tmp_path / UNIT.name
    path.write_text(text.replace("/usr/local/bin/dstack-mesh", shutil.which("true") or "/bin/true"))
    return path


def test_systemd_finds_no_fault(analyze: str, tmp_path: Path) -> None:
    assert _verify(analyze, _elsewhere(tmp_path, UNIT.read_text())) == ""


def test_systemd_would_find_one(analyze: str, tmp_path: Path) -> None:
    text = UNIT.read_text().replace("NoNewPrivileges=", "NoNewPrivilege=")
    assert "NoNewPrivilege" in _verify(analyze, _elsewhere(tmp_path, text))


def test_stopping_may_take_as_long_as_draining(service: configparser.SectionProxy) -> None:
    settings = load_settings({}, {}, None).settings
    assert float(service["TimeoutStopSec"].removesuffix("s")) > settings.drain_timeout


def test_wrong_settings_are_not_tried_again(service: configparser.SectionProxy) -> None:
    assert service["RestartPreventExitStatus"] == "2"
    assert service["Type"] == "notify"

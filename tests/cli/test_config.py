from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from dstack_mesh.cli import main
from dstack_mesh.settings.load import load_settings


def test_it_prints_a_settings_file_with_sources(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MESH_GATEWAY", "gw.example.com")
    arguments = ["--agent-address", "unix:/a", "--backend", "app:80"]
    assert main(["config", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert 'gateway_domain = "gw.example.com"  # env MESH_GATEWAY\n' in captured.out
    assert 'backend = "app:80"  # flag --backend\n' in captured.out

    file = tmp_path / "again.toml"
    file.write_text(captured.out)
    flags = {"dstack.agent": "unix:/a", "inbound.backend": "app:80"}
    environ = {"MESH_GATEWAY": "gw.example.com"}
    again = load_settings({}, {}, file)
    assert again.settings == load_settings(flags, environ, None).settings


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[admin]\nlisten = 'off'")
    assert main(["config", "--json", "-c", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["admin.listen"] == {"value": "off", "source": f"file {file}"}
    assert found["outbound.listen"] == {"value": "127.0.0.1:8091", "source": "default"}


def test_warnings_stay_out_of_the_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_BACKND", "app:80")
    assert main(["config", "--agent-address", "unix:/a"]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "warning: MESH_BACKND is not a setting; the nearest known is MESH_BACKEND\n"
    )
    tomllib.loads(captured.out)


def test_a_bad_value_ends_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--log-format", "xml"]) == 2
    captured = capsys.readouterr()
    assert captured.err == 'dstack-mesh: --log-format is "xml": accepted is json or text\n'
    assert captured.out == ""

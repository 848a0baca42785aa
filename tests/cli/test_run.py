from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dstack_mesh
from dstack_mesh.cli import main
from dstack_mesh.settings.load import Loaded


class App(ModuleType):
    """Stands in for `dstack_mesh.app`: keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__("dstack_mesh.app")
        self.status = 0
        self.calls: list[tuple[Loaded, Path | None]] = []

    def run(self, loaded: Loaded, ready_file: Path | None) -> int:
        self.calls.append((loaded, ready_file))
        return self.status


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, logging_as_before: None) -> App:
    found = App()
    monkeypatch.setitem(sys.modules, "dstack_mesh.app", found)
    monkeypatch.setattr(dstack_mesh, "app", found, raising=False)
    return found


@pytest.mark.parametrize("status", [0, 1, 130])
def test_the_apps_status_is_the_commands(app: App, status: int) -> None:
    app.status = status
    assert main(["run", "--agent-address", "unix:/a"]) == status


def test_settings_and_ready_file_reach_the_app(app: App, tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("max_connections = 5")
    ready = tmp_path / "ready.json"
    assert main(["run", "-c", str(file), "--ready-file", str(ready), "--idle-timeout", "9s"]) == 0
    ((loaded, ready_file),) = app.calls
    assert ready_file == ready
    assert (loaded.settings.max_connections, loaded.settings.idle_timeout) == (5, 9)
    assert str(loaded.sources["idle_timeout"]) == "flag --idle-timeout"


def test_a_file_alone_is_run(app: App, tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("max_connections = 5")
    assert main(["-c", str(file)]) == 0
    ((loaded, ready_file),) = app.calls
    assert (loaded.settings.max_connections, ready_file) == (5, None)


@pytest.mark.usefixtures("app")
def test_warnings_are_log_events(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MESH_BACKND", "x")
    assert main(["run", "--agent-address", "unix:/a"]) == 0
    line = json.loads(capfd.readouterr().err)
    assert (line["level"], line["event"]) == ("warning", "settings_warning")
    assert line["detail"] == "MESH_BACKND is not a setting; the nearest known is MESH_BACKEND"


def test_wrong_settings_never_start_the_app(app: App, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--allowed-apps", ""]) == 2
    assert app.calls == []
    assert capsys.readouterr().err.startswith('dstack-mesh: --allowed-apps is "": ')

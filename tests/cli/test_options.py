from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dstack_mesh.cli.options import load, settings_options
from dstack_mesh.settings.schema import SCHEMA


@click.command
@settings_options
def probe(config: Path | None, **flags: Any) -> None:
    loaded = load(config, flags)
    given = {key: str(source) for key, source in loaded.sources.items() if source.kind != "default"}
    click.echo(repr(given))


def test_every_setting_has_a_flag_that_says_variable_and_default() -> None:
    text = " ".join(
        CliRunner()
        .invoke(probe, ["--help"], max_content_width=500, terminal_width=500)
        .output.split()
    )
    for setting in SCHEMA:
        assert f" {setting.flag} " in text
        assert f"[{setting.env[0]}; default: {setting.default or setting.when_unset}]" in text


@pytest.mark.parametrize("flag", ["-c", "--config"])
def test_flag_environment_and_file_arrive(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("head_timeout = 1")
    monkeypatch.setenv("MESH_IDLE_TIMEOUT", "7m")
    ran = CliRunner().invoke(
        probe, [flag, str(file), "--agent-address", "unix:/a", "--default-port", "80"]
    )
    assert eval(ran.output) == {
        "outbound.default_port": "flag --default-port",
        "dstack.agent": "flag --agent-address",
        "idle_timeout": "env MESH_IDLE_TIMEOUT",
        "head_timeout": f"file {file}",
    }


def test_a_few_words_are_completed() -> None:
    option = next(p for p in probe.params if "--log-level" in p.opts)
    found = option.shell_complete(click.Context(probe), "d")
    assert [item.value for item in found] == ["debug"]

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest

import dstack_mesh
from dstack_mesh import cli
from dstack_mesh.settings.errors import SettingsError

HEAVY = {"rich", "httpx2", "cryptography", "uvloop", "asyncio", "dstack_mesh.sim"}

MESH = [sys.executable, "-m", "dstack_mesh"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Puts a function in the place of the command `version`."""

    def put(function: Callable[[], object]) -> None:
        module = ModuleType("dstack_mesh.cli.version")
        vars(module)["version"] = click.command("version")(function)
        monkeypatch.setitem(sys.modules, "dstack_mesh.cli.version", module)

    return put


@pytest.fixture
def ended_by(
    command: Callable[[Callable[[], object]], None],
) -> Callable[[BaseException], int]:
    def run(error: BaseException) -> int:
        def fail() -> None:
            raise error

        command(fail)
        return cli.main(["version"])

    return run


def _modules_after(*arguments: str) -> set[str]:
    code = (
        "import sys; from dstack_mesh.cli import main; "
        f"status = main({list(arguments)!r}); print('modules:', *sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    return set(ran.stdout.rpartition("modules:")[2].split())


def _ancestors(modules: set[str]) -> set[str]:
    return modules | {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["version"],
        ["config"],
        ["run", "--help"],
        ["await", "--timeout", "0", "--admin-listen", "127.0.0.1:9"],
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    assert not HEAVY & _ancestors(_modules_after(*arguments))


def test_no_arguments_show_the_help_as_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"  {name} " not in text] == []


def test_every_command_has_its_module_and_is_named_like_it() -> None:
    context = click.Context(cli.cli)
    for name in cli.COMMANDS:
        found = cli.cli.get_command(context, name)
        assert isinstance(found, click.Command)
        assert found.name == name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["confg"], "No such command 'confg'. Did you mean 'config'?"),
        (["zzz"], "No such command 'zzz'. Commands: run, await"),
        (["config", "--gatewy", "x"], "--gateway"),
        (["version", "extra"], "extra"),
    ],
)
def test_wrong_usage_names_the_nearest(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_wrong_settings_end_with_2_and_one_line(
    ended_by: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_by(SettingsError("MESH_X is wrong")) == 2
    assert capsys.readouterr().err == "dstack-mesh: MESH_X is wrong\n"


def test_a_failure_ends_with_1(
    ended_by: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_by(click.ClickException("it failed")) == 1
    assert capsys.readouterr().err == "dstack-mesh: it failed\n"


def test_an_interrupted_command_ends_with_130(ended_by: Callable[[BaseException], int]) -> None:
    assert ended_by(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(("given", "status"), [(None, 0), (0, 0), (1, 1), (143, 143)])
def test_a_command_may_give_its_exit_status(
    command: Callable[[Callable[[], object]], None], given: int | None, status: int
) -> None:
    command(lambda: given)
    assert cli.main(["version"]) == status


def test_an_unforeseen_error_is_not_hidden(ended_by: Callable[[BaseException], int]) -> None:
    with pytest.raises(ZeroDivisionError):
        ended_by(ZeroDivisionError())


@pytest.mark.parametrize("call", [["-c", "F"], ["-cF"], ["--config", "F"], ["--config=F"]])
def test_the_rust_meshs_call_is_run(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(call) == 2  # run it is: the file is what is missing
    assert capsys.readouterr().err == "dstack-mesh: F: cannot be read: No such file or directory\n"


def test_a_reader_that_goes_away_is_met_with_silence() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [*MESH, "config"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=30, check=False
    )
    os.close(write)
    noise = [line for line in ran.stderr.splitlines() if not line.startswith("warning: ")]
    assert (ran.returncode, noise) == (1, [])


def test_version_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dstack-mesh {dstack_mesh.__version__}\n"


@pytest.fixture
def on_path(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has `dstack-mesh`."""
    script = tmp_path / "dstack-mesh"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dstack_mesh "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_there(shell: str, on_path: dict[str, str]) -> None:
    ran = subprocess.run(
        ["dstack-mesh"],
        env={**on_path, "_DSTACK_MESH_COMPLETE": f"{shell}_source"},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert f"_DSTACK_MESH_COMPLETE={shell}_complete" in ran.stdout


@pytest.mark.parametrize(
    ("words", "word", "expected"),
    [
        (
            "dstack-mesh ",
            1,
            {
                "run",
                "await",
                "check",
                "demo",
                "sim",
                "policy",
                "inspect",
                "nginx-config",
                "config",
                "version",
            },
        ),
        ("dstack-mesh co", 1, {"config"}),
        ("dstack-mesh config --gate", 2, {"--gateway", "--gateway-connect"}),
        ("dstack-mesh run --log-format ", 3, {"json", "text"}),
    ],
)
def test_completion_completes(
    words: str, word: int, expected: set[str], on_path: dict[str, str]
) -> None:
    began = time.monotonic()
    ran = subprocess.run(
        ["dstack-mesh"],
        env={
            **on_path,
            "_DSTACK_MESH_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(word),
        },
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    found = {line.partition(",")[2] for line in ran.stdout.splitlines()}
    assert found == expected
    assert time.monotonic() - began < 5  # far under a second where nothing else runs

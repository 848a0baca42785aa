from __future__ import annotations

from pathlib import Path

import pytest

from dstack_mesh.cli import main

BASE = ["nginx-config", "--agent-address", "unix:/a", "--backend", "app:80"]


@pytest.fixture
def identity(tmp_path: Path) -> list[str]:
    """Flags that name the three files of an identity."""
    flags = []
    for name in ("cert", "key", "ca"):
        (tmp_path / name).touch()
        flags += [f"--{name}-file", str(tmp_path / name)]
    return flags


def test_a_whole_file(capsys: pytest.CaptureFixture[str], identity: list[str]) -> None:
    assert main([*BASE, "--inbound-mode", "nginx", *identity]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("# Made by `dstack-mesh nginx-config`")
    assert "\nhttp {\n" in captured.out
    assert "        server app:80 max_fails=0;\n" in captured.out
    assert captured.out.endswith("}\n")


def test_only_the_server(capsys: pytest.CaptureFixture[str], identity: list[str]) -> None:
    assert main([*BASE, "--inbound-mode", "nginx", *identity, "--server"]) == 0
    out = capsys.readouterr().out
    assert "\nserver {\n    listen 0.0.0.0:8443 ssl" in out
    assert "http {" not in out
    assert "events {" not in out


def test_the_state_directory(
    capsys: pytest.CaptureFixture[str], identity: list[str], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    assert main([*BASE, *identity, "--state-dir", str(state)]) == 0
    assert f'pid "{state}/nginx.pid";' in capsys.readouterr().out


def test_what_the_reader_should_know_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(BASE) == 0
    captured = capsys.readouterr()
    mode, files = captured.err.splitlines()
    assert mode.startswith("warning: inbound.mode is embedded: nothing answers nginx")
    assert files.startswith("warning: tls.cert_file, tls.key_file, tls.ca_file are not set")
    assert "warning" not in captured.out


def test_what_nginx_cannot_be_told_ends_with_2_and_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["nginx-config", "--agent-address", "unix:/a"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "dstack-mesh: inbound.backend (MESH_BACKEND) is not set: nginx needs a backend to pass"
        " requests to\n"
    )
    assert captured.out == ""
    assert main([*BASE, "--backend", "x"]) == 2
    assert "--backend" in capsys.readouterr().err

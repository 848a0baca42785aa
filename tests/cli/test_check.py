from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_mesh.cli import main

APP = "d4" * 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Give the environment of a simulated app whose sidecar does not run."""
    folder = tmp_path_factory.mktemp("sim")
    command = [sys.executable, "-m", "dstack_mesh", "sim", "--apps", "a", "--json"]
    with subprocess.Popen(
        [*command, "--dir", str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            text = ""
            while True:
                text += process.stdout.readline()
                try:
                    described = json.loads(text)
                except ValueError:
                    assert process.poll() is None, text
                else:
                    break
            env: dict[str, str] = described["apps"]["a"]["env"]
            yield env
        finally:
            process.terminate()


@pytest.fixture(autouse=True)
def environment(world: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in world.items():
        monkeypatch.setenv(name, value)


def test_text(capsys: pytest.CaptureFixture[str], world: dict[str, str]) -> None:
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    agent = world["DSTACK_AGENT_ADDRESS"]
    assert f"guest agent\n  ok    the guest agent answers: {agent}\n" in out
    assert "  WARN  the sidecar is ready: none runs here" in out
    assert "        -> start it: dstack-mesh run\n" in out
    assert out.splitlines()[-1].startswith("0 failed, ")


def test_json_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", "--sys-config", "/nowhere"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    gateway = next(group for group in found["groups"] if group["name"] == "gateway")
    assert gateway["checks"][0]["status"] == "failed"
    assert set(gateway["checks"][0]) == {"name", "status", "detail", "remedy"}


def test_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", APP]) == 1
    out = capsys.readouterr().out
    assert f"target {APP}\n  ok    its name is valid: " in out
    assert "  FAIL  TLS comes about: " in out
    assert "  -     it is the app asked for: the way ends at: TLS comes about\n" in out


def test_it_waits_for_what_comes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, world: dict[str, str]
) -> None:
    config = tmp_path / "sys.json"
    content = Path(world["MESH_SYS_CONFIG"]).read_text()
    script = "import sys, time; time.sleep(1); open(sys.argv[1], 'w').write(sys.argv[2])"
    with subprocess.Popen([sys.executable, "-c", script, str(config), content]):
        assert main(["check", "--wait", "30", "--sys-config", str(config)]) == 0
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["billing"], 'TARGET_APP is "billing": accepted is an app-id, 40 hex digits'),
        (["--wait", "soon"], '--wait is "soon": accepted is a time'),
        (["--log-format", "xml"], "--log-format"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["check", *arguments]) == 2
    assert said in capsys.readouterr().err

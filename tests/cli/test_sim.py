"""`dstack-mesh sim` as a process: what it prints, how it ends, what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest
from click.testing import CliRunner
from cryptography.x509 import load_pem_x509_certificate

from dstack_mesh.cli.sim import sim
from dstack_mesh.sim.ports import common_port

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN = [sys.executable, "-m", "dstack_mesh", "sim"]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test, whatever happens."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(started: list[subprocess.Popen[str]], *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    started.append(process)
    return process


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_runs_until_a_signal_and_cleans_up(
    started: list[subprocess.Popen[str]], number: signal.Signals, status: int
) -> None:
    process = start(started, "--apps", "a,b", "--json")
    world = json.loads(first_line(process))
    assert list(world["apps"]) == ["a", "b"]
    assert Path(world["apps"]["a"]["dir"], "dstack.sock").is_socket()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (status, "")
    assert not Path(world["dir"]).exists()


def test_it_prints_what_the_env_files_say(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(started, "--apps", "a,b", "--dir", str(tmp_path))
    assert "sim.dstack.test" in first_line(process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    shown = process.stdout.read()
    process.wait(20)
    for name in ("a", "b"):
        assert (tmp_path / name / "env").read_text() in shown
    assert "x-dstack-target-app: " in shown
    assert not (tmp_path / "a" / "dstack.sock").exists()


def test_second_simulator_on_a_directory_is_refused(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    first = start(started, "--apps", "a", "--dir", str(tmp_path))
    first_line(first)
    second = start(started, "--apps", "a", "--dir", str(tmp_path))
    _, errors = second.communicate(timeout=20)
    assert second.returncode == 1
    assert errors.splitlines() == [
        f"dstack-mesh: {tmp_path}: a simulator already runs here; stop it or use another --dir"
    ]
    first.kill()
    first.wait()
    third = start(started, "--apps", "a", "--dir", str(tmp_path), "--json")
    assert json.loads(first_line(third))


@pytest.mark.parametrize("apps", ["", "a,,b", "a/b", "a,a", "a=x y"])
def test_bad_apps_are_wrong_usage(apps: str) -> None:
    result = CliRunner().invoke(sim, ["--apps", apps])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ")


def test_without_apps_it_is_wrong_usage() -> None:
    assert CliRunner().invoke(sim, []).exit_code == 2


def test_directory_that_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file" / "below", tmp_path / ("x" * 100)):
        result = CliRunner().invoke(sim, ["--apps", "a", "--dir", str(directory)])
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert "Traceback" not in result.output


def test_a_port_and_a_seed_make_the_same_world_again(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """So sidecars need not be started again with it: same address, and the same KMS by its key."""
    port = common_port(["127.0.0.1"])
    keys = []
    for seed in ("x", "x", "y"):
        arguments = ("--listen", f"127.0.0.1:{port}", "--seed", seed, "--json")
        process = start(started, "--apps", "a", "--dir", str(tmp_path), *arguments)
        world = json.loads(first_line(process))
        assert world["gateway"] == f"127.0.0.1:{port}"
        socket = world["apps"]["a"]["env"]["DSTACK_AGENT_ADDRESS"].removeprefix("unix:")
        transport = httpx2.HTTPTransport(uds=socket)
        with httpx2.Client(transport=transport, base_url="http://agent") as client:
            chain = client.get("/GetTlsKey").json()["certificate_chain"]
        root = load_pem_x509_certificate(chain[-1].encode())
        keys.append(root.public_key())
        process.terminate()
        assert process.wait(20) == 0
    assert keys[0] == keys[1] != keys[2]

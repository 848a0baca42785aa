"""`run`: one process or several, from its start to its exit status."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_mesh import app
from dstack_mesh.settings.load import load_settings
from tests.integration.processes import COMMAND, children, clean_environ, is_there

FREE = "127.0.0.1:0"
SECONDS = 20.0

both = pytest.mark.parametrize("workers", [1, 3])


def environ(directory: Path, workers: int) -> dict[str, str]:
    """Give the settings of a sidecar whose guest agent is absent."""
    return {
        "DSTACK_AGENT_ADDRESS": f"unix:{directory}/absent.sock",
        "MESH_GATEWAY": "apps.example",
        "MESH_OUTBOUND_LISTEN": FREE,
        "MESH_ADMIN_LISTEN": FREE,
        "MESH_WORKERS": str(workers),
    }


def until(condition: object) -> None:
    end = time.monotonic() + SECONDS
    assert callable(condition)
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


class Running:
    """A started `dstack-mesh run`, and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def events(self, name: str) -> list[dict[str, object]]:
        complete = self.log.read_text().rpartition("\n")[0].splitlines()
        return [line for line in map(json.loads, complete) if line["event"] == name]


@contextlib.contextmanager
def running(directory: Path, env: dict[str, str], *arguments: str) -> Iterator[Running]:
    log = directory / "log.jsonl"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "run", *arguments],
            env={**clean_environ(), **env},
            stderr=output,
            stdout=output,
        )
    try:
        yield Running(process, log)
    finally:
        if process.poll() is None:
            workers = children(process.pid)
            for pid in (process.pid, *workers):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@both
def test_an_address_in_use_is_one_line_and_status_1(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is left of what was bound before it."""
    outbound, ready = tmp_path / "outbound.sock", tmp_path / "ready.json"
    ready.write_text("of the mesh that runs there")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        env = environ(tmp_path, workers)
        env |= {"MESH_OUTBOUND_LISTEN": f"unix:{outbound}", "MESH_ADMIN_LISTEN": address}
        assert app.run(load_settings({}, env, None), ready) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"dstack-mesh: cannot listen on {address}: another process listens")
    assert not outbound.exists()
    assert ready.read_text() == "of the mesh that runs there"


@both
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_as_it_is_told_to(
    tmp_path: Path, workers: int, number: signal.Signals, status: int
) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text("left by a mesh that was killed")
    with running(tmp_path, environ(tmp_path, workers), "--ready-file", str(ready)) as one:
        until(lambda: len(one.events("identity_fetch_failed")) >= workers)
        assert not ready.exists(), "there is no identity"
        found = children(one.process.pid)
        assert len(found) == (workers if workers > 1 else 0)
        one.process.send_signal(number)
        assert one.process.wait(SECONDS) == status
        assert len(one.events("stopped")) == workers
        assert not any(map(is_there, found))
    assert "Traceback" not in one.log.read_text()


@both
def test_a_hangup_reads_the_settings_again(tmp_path: Path, workers: int) -> None:
    config = tmp_path / "mesh.toml"
    config.touch()
    with running(tmp_path, environ(tmp_path, workers), "-c", str(config)) as one:
        until(lambda: len(one.events("identity_fetch_failed")) >= workers)
        config.write_text("[inbound]\nallow = 'self'\n")
        one.process.send_signal(signal.SIGHUP)
        until(lambda: len(one.events("settings_reloaded")) == workers)
        assert {str(line["changed"]) for line in one.events("settings_reloaded")} == {
            "['inbound.allow']"
        }
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(SECONDS) == 0


def test_the_listeners_are_one_socket_for_all(tmp_path: Path) -> None:
    """So that what waits in its queue is for whoever of them is there."""
    with running(tmp_path, environ(tmp_path, 2)) as one:
        until(lambda: len(one.events("identity_fetch_failed")) >= 2)
        first, second = (_sockets(pid) for pid in children(one.process.pid))
        supervisor = _sockets(one.process.pid)
        (address,) = {
            line["address"] for line in one.events("listening") if line["listener"] == "outbound"
        }
        port = int(str(address).rpartition(":")[2])
        inodes = _listening(port)
        assert len(inodes) == 1
        assert inodes <= first & second & supervisor


def _sockets(pid: int) -> set[str]:
    """Give the inodes of a process's sockets."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            kind, _, inode = str(link.readlink()).partition(":")
            if kind == "socket":
                found.add(inode.strip("[]"))
    return found


def _listening(port: int) -> set[str]:
    """Give the inodes of what listens on a port of 127.0.0.1."""
    fields = map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {one[9] for one in fields if one[1] == f"0100007F:{port:04X}" and one[3] == "0A"}

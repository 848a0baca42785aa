from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_mesh.cli import main

COMMAND = [sys.executable, "-m", "dstack_mesh", "await"]
READY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def not_ready(**reasons: str) -> bytes:
    checks = {name: {"ok": False, "reason": reason} for name, reason in reasons.items()}
    checks["gateway"] = {"ok": True, "reason": "gw.example.com"}
    body = json.dumps({"ready": False, "checks": checks}).encode()
    return b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Admin:
    """An admin listener in a thread: gives `answers` in turn, the last one again and again."""

    def __init__(self, family: int, where: object, answers: list[bytes]) -> None:
        self.asked: list[bytes] = []
        self._answers = answers
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind(where)  # type: ignore[arg-type]
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        name = self._socket.getsockname()
        if isinstance(name, str):
            return f"unix:{name}"
        return f"{name[0]}:{name[1]}" if ":" not in name[0] else f"[{name[0]}]:{name[1]}"

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(65536))
                at = min(len(self.asked), len(self._answers)) - 1
                connection.sendall(self._answers[at])


Start = Callable[..., Admin]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Admin] = []

    def one(*answers: bytes, family: int = socket.AF_INET, where: object = None) -> Admin:
        running.append(Admin(family, where or ("127.0.0.1", 0), list(answers)))
        return running[-1]

    yield one
    for admin in running:
        admin.close()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MESH_ADMIN_LISTEN", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_ready_mesh_is_not_waited_for(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    admin = start(READY)
    assert main(["await", "--admin-listen", admin.address]) == 0
    assert admin.asked == [b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n"]
    assert capsys.readouterr() == ("", "")


def test_a_unix_socket(start: Start, tmp_path: Path) -> None:
    path = str(tmp_path / "admin.sock")
    start(READY, family=socket.AF_UNIX, where=path)
    assert main(["await", "--admin-listen", f"unix:{path}"]) == 0


def test_each_new_reason_is_told_once_while_waiting(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    no_key = not_ready(identity="no key yet")
    admin = start(no_key, no_key, not_ready(identity="expired", draining="stopping"), READY)
    assert main(["await", "--admin-listen", admin.address]) == 0
    assert len(admin.asked) == 4
    assert capsys.readouterr().err.splitlines() == [
        "dstack-mesh: waiting: identity: no key yet",
        "dstack-mesh: waiting: identity: expired; draining: stopping",
    ]


def test_when_the_time_is_over_the_last_reason_is_told(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = start(not_ready(identity="no key yet"))
    began = time.monotonic()
    assert main(["await", "--timeout", "300ms", "--admin-listen", admin.address]) == 1
    assert 0.25 < time.monotonic() - began < 5
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "dstack-mesh: not ready within 300ms: identity: no key yet"


def test_a_timeout_of_0_asks_once(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    admin = start(not_ready(identity="no key yet"), READY)
    assert main(["await", "--timeout", "0", "--admin-listen", admin.address]) == 1
    assert len(admin.asked) == 1
    assert "waiting" not in capsys.readouterr().err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["await", "--timeout", "0", "--admin-listen", address]) == 1
    assert capsys.readouterr().err == (
        f"dstack-mesh: not ready within 0: no mesh answers on {address} (Connection refused):"
        " is it running there?\n"
    )


def test_a_missing_unix_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"unix:{tmp_path}/none.sock"
    assert main(["await", "--timeout", "0", "--admin-listen", address]) == 1
    assert "No such file or directory" in capsys.readouterr().err


def test_one_that_takes_the_connection_and_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert main(["await", "--timeout", "400ms", "--admin-listen", address]) == 1
        assert time.monotonic() - began < 5
    assert "does not answer within" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "is no mesh's admin listener (404)"),
        (b"SSH-2.0-x\r\n", "is no mesh's admin listener (0)"),
        (b"", "is no mesh's admin listener (0)"),
        (b"HTTP/1.1 503 No\r\n\r\n<html>", "it says that it is not ready"),
        (b'HTTP/1.1 503 No\r\n\r\n{"checks": []}', "it says that it is not ready"),
        (b'HTTP/1.1 503 No\r\n\r\n{"checks": {"a": 1}}', "it says that it is not ready"),
    ],
)
def test_other_answers(
    start: Start, capsys: pytest.CaptureFixture[str], answer: bytes, said: str
) -> None:
    assert main(["await", "--timeout", "0", "--admin-listen", start(answer).address]) == 1
    assert said in capsys.readouterr().err


def test_flag_beats_environment_beats_file(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag, environ, file = start(READY), start(READY), start(READY)
    config = tmp_path / "mesh.toml"
    config.write_text(f'[admin]\nlisten = "{file.address}"\n')
    assert main(["await", "-c", str(config)]) == 0
    assert (len(flag.asked), len(environ.asked), len(file.asked)) == (0, 0, 1)
    monkeypatch.setenv("MESH_ADMIN_LISTEN", environ.address)
    assert main(["await", "-c", str(config)]) == 0
    assert (len(flag.asked), len(environ.asked), len(file.asked)) == (0, 1, 1)
    assert main(["await", "-c", str(config), "--admin-listen", flag.address]) == 0
    assert (len(flag.asked), len(environ.asked), len(file.asked)) == (1, 1, 1)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_wildcard_is_asked_on_loopback(start: Start, host: str) -> None:
    if host == "[::]":
        try:
            admin = start(READY, family=socket.AF_INET6, where=("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    else:
        admin = start(READY)
    port = admin.address.rpartition(":")[2]
    assert main(["await", "--timeout", "0", "--admin-listen", f"{host}:{port}"]) == 0
    assert len(admin.asked) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--admin-listen", "nonsense"], '--admin-listen is "nonsense": accepted is host:port'),
        (["--admin-listen", "off"], "--admin-listen is off: a mesh without an admin listener"),
        (["--admin-listen", "127.0.0.1:0"], "--admin-listen is 127.0.0.1:0, any free port"),
        (["--timeout", "soon"], '--timeout is "soon": accepted is a time'),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["await", *arguments]) == 2
    assert said in capsys.readouterr().err


# As a process.


def run(*arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def test_the_command_takes_the_process(start: Start) -> None:
    code = "import os, sys; print(os.getpid(), *sys.argv[1:]); sys.exit(7)"
    with subprocess.Popen(
        [*COMMAND, "--admin-listen", start(READY).address, "--", sys.executable, "-c", code, "-v"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        output, _ = process.communicate(timeout=30)
    assert output.split() == [str(process.pid), "-v"]
    assert process.returncode == 7


def test_the_command_does_not_inherit_ignored_signals(start: Start) -> None:
    ran = run("--admin-listen", start(READY).address, "--", "grep", "SigIgn", "/proc/self/status")
    mask = int(ran.stdout.split()[1], 16)
    assert not mask & (1 << (signal.SIGPIPE - 1))
    assert not mask & (1 << (signal.SIGTERM - 1))


def test_the_command_is_not_run_before(start: Start, tmp_path: Path) -> None:
    made = tmp_path / "made"
    address = start(not_ready(identity="no key yet")).address
    ran = run("--timeout", "0", "--admin-listen", address, "--", "touch", str(made))
    assert (ran.returncode, made.exists()) == (1, False)


def test_a_command_that_is_not_there(start: Start) -> None:
    ran = run("--admin-listen", start(READY).address, "--", "/no/such/command")
    assert ran.returncode == 1
    assert ran.stderr == "dstack-mesh: cannot run /no/such/command: No such file or directory\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_is_interrupted_at_once(start: Start, number: signal.Signals, status: int) -> None:
    address = start(not_ready(identity="no key yet")).address
    with subprocess.Popen(
        [*COMMAND, "--admin-listen", address], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "dstack-mesh: waiting: identity: no key yet\n"
        process.send_signal(number)
        assert process.wait(10) == status
        assert "Traceback" not in process.stderr.read()


def test_it_is_cheap_enough_for_a_health_check(start: Start) -> None:
    """Its processor time, which other work on the machine adds little to: some 90 ms."""
    address = start(READY).address
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--timeout", "0", "--admin-listen", address).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    limit = 0.25 if "COVERAGE_PROCESS_START" not in os.environ else 1.0
    assert min(spent) < limit

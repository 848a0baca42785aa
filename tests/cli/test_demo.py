"""`dstack-mesh demo` as a process: what it shows, how it ends, what it leaves behind (nothing)."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_mesh.cli import main

demo = importlib.import_module("dstack_mesh.cli.demo")  # the module, not the command in it

RUN = [sys.executable, "-m", "dstack_mesh", "demo"]


class Demos:
    """Demos started by a test, each with a directory of its own for what is temporary."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*RUN, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "TMPDIR": str(self.temporary), "COLUMNS": "100", **environ},
        )
        self._processes.append(process)
        return process

    def run(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environ)
        out, err = process.communicate(timeout=50)
        return process.returncode, out, err

    def sidecars(self) -> list[int]:
        """Find the sidecars that these demos have started and that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                arguments = path.read_bytes()
            except OSError:
                continue
            if str(self.temporary).encode() in arguments and b"--ready-file" in arguments:
                found.append(int(path.parent.name))
        return found

    def nothing_is_left(self) -> bool:
        return self.sidecars() == [] and list(self.temporary.iterdir()) == []

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        for pid in self.sidecars():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def demos() -> Iterator[Demos]:
    # Not pytest's own directory: its path would be too long for unix sockets.
    temporary = Path(tempfile.mkdtemp(prefix="t"))
    found = Demos(temporary)
    yield found
    found.close()
    shutil.rmtree(temporary)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, f"it ended after: {seen}"
        seen += line
    return seen


def test_each_act_does_what_it_should(demos: Demos) -> None:
    status, out, err = demos.run(MESH_BACKEND="nowhere.test:1", HTTP_PROXY="http://127.0.0.1:1")
    assert (status, err) == (0, ""), out
    assert "All 10 went as they should" in out
    assert out.count("✓") == 10
    assert "\x1b" not in out
    assert demos.nothing_is_left()


def test_json_is_one_line(demos: Demos) -> None:
    status, out, err = demos.run("--json")
    assert (status, err) == (0, "")
    (line,) = out.splitlines()
    told = json.loads(line)
    assert told["ok"] is True
    assert [act["name"] for act in told["acts"]] == [
        *("guest_agent", "call", "forged_caller", "upload", "event_stream"),
        *("wrong_app", "foreign_kms_target", "impostor", "foreign_kms_caller", "no_certificate"),
    ]
    assert demos.nothing_is_left()


def test_encoding_without_arrows_is_no_obstacle(demos: Demos) -> None:
    status, out, err = demos.run(PYTHONIOENCODING="ascii")
    assert (status, err) == (0, "")
    assert out.isascii()
    assert out.count("\n  + ") == 10


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)]
)
def test_kept_demo_ends_by_a_signal(demos: Demos, number: signal.Signals, status: int) -> None:
    process = demos.start("--keep")
    seen = read_until(process, "tail -f ")
    assert "APP_ID=$(curl -s http://127.0.0.1:" in seen
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, "")
    assert demos.nothing_is_left()


def test_kept_demo_says_so_in_json(demos: Demos) -> None:
    process = demos.start("--keep", "--json")
    told = json.loads(read_until(process, "\n"))
    assert told["try"]
    assert len(demos.sidecars()) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert demos.nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("running", [0, 1, 2])
def test_early_signal_leaves_nothing_behind(
    demos: Demos, number: signal.Signals, running: int
) -> None:
    process = demos.start()
    if running:
        wait_until(lambda: len(demos.sidecars()) >= running)
    else:
        wait_until(lambda: any(demos.temporary.iterdir()))
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert "Traceback" not in err
    assert process.returncode == (130 if number is signal.SIGINT else 1)
    assert demos.nothing_is_left()


def test_sidecar_that_dies_fails_the_demo(demos: Demos) -> None:
    process = demos.start()
    seen = read_until(process, "ledger")
    (pid,) = {int(line.split()[-1]) for line in seen.splitlines() if "billing  app" in line}
    os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (1, "")
    assert "billing's sidecar ended by signal 9" in " ".join(out.split())
    assert "did not go as they should" in out
    assert demos.nothing_is_left()


def test_place_without_room_is_told_in_one_line(demos: Demos) -> None:
    long = demos.temporary / ("x" * 80)
    long.mkdir()
    for arguments in ((), ("--json",)):
        status, out, err = demos.run(*arguments, TMPDIR=str(long))
        assert (status, out) == (1, "")
        assert err.startswith(f"dstack-mesh: demo: {long}: the path is too long")
        assert len(err.splitlines()) == 1


def test_reader_that_goes_away_ends_it(demos: Demos) -> None:
    process = demos.start()
    read_until(process, "dstack-mesh demo")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(20) == 1
    assert demos.nothing_is_left()


class FakeDemo:
    """Stands in for `demo.play.Demo`: sends itself the signals it is told to, and cleans up."""

    def __init__(self, *numbers: signal.Signals, ok: bool = True, complete: bool = True) -> None:
        self._numbers = numbers
        self.ok = ok
        self.complete = complete
        self.cleaned_up = False

    async def run(self) -> None:
        for number in self._numbers:
            os.kill(os.getpid(), number)
        try:
            if self._numbers:
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)  # as stopping processes takes time
            self.cleaned_up = True


@pytest.mark.parametrize(
    ("one", "status"),
    [
        (FakeDemo(), 0),
        (FakeDemo(ok=False), 1),
        (FakeDemo(signal.SIGTERM), 0),
        (FakeDemo(signal.SIGHUP), 0),
        (FakeDemo(signal.SIGTERM, signal.SIGTERM), 0),
        (FakeDemo(signal.SIGTERM, ok=False), 1),
        (FakeDemo(signal.SIGTERM, ok=False, complete=False), 1),
        (FakeDemo(signal.SIGINT), 130),
        (FakeDemo(signal.SIGINT, ok=False, complete=False), 130),
    ],
)
def test_status_tells_what_happened(
    one: FakeDemo, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asyncio.run(demo._run(one)) == status
    assert one.cleaned_up
    said = "" if one.complete or status == 130 else "SIGTERM came before all was tried"
    assert said in capsys.readouterr().err


async def test_other_cancellations_are_not_taken_for_a_signal() -> None:
    waiting = FakeDemo()
    waiting.run = asyncio.Event().wait  # type: ignore[method-assign]
    task = asyncio.create_task(demo._run(waiting))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_display_is_as_asked(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dstack_mesh.demo.stage.tempfile.tempdir", None)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["ok"] if arguments else "All 10 went as they should" in out


def test_stage_that_cannot_be_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dstack_mesh.demo.stage.tempfile.tempdir", "/nowhere")
    assert main(["demo", "--json"]) == 1
    assert capsys.readouterr().err.startswith("dstack-mesh: demo: [Errno 2]")


def test_what_an_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    stdout = io.TextIOWrapper(out, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    demo._never_fail_to_encode()
    stdout.write("✓ a → b ü")
    stdout.flush()
    assert out.getvalue() == b"+ a > b ?"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", errors="dstack_mesh_plain")

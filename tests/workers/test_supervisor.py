"""The supervisor in a process of its own, with workers that only do what a test tells them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_mesh import listen
from dstack_mesh.model import TcpAddress
from dstack_mesh.ops import logs
from dstack_mesh.ops.systemd import Notifier
from dstack_mesh.settings.load import load_settings
from dstack_mesh.workers import supervisor
from dstack_mesh.workers.reread import Reread
from dstack_mesh.workers.seat import Seat
from dstack_mesh.workers.supervisor import Supervisor

SECONDS = 10.0

Work = Callable[[Seat], int]


def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)


class FakeNotifier(Notifier):
    """Notes on a pipe what systemd would be told."""

    def __init__(self, descriptor: int, watchdog: float | None) -> None:
        super().__init__("@nobody" if watchdog else None, watchdog)
        self._descriptor = descriptor

    def _send(self, *lines: str) -> None:
        if lines:
            os.write(self._descriptor, f"{lines[0]}\n".encode())


class Run:
    """A supervisor that runs, forked from the test."""

    def __init__(self, directory: Path, work: Work, *, watchdog: float | None = None) -> None:
        self.directory = directory
        self.ready_file = directory / "ready.json"
        self.config = directory / "mesh.toml"
        self.config.touch()
        self.log_file = directory / "log"
        self.sock = listen.bind(TcpAddress("127.0.0.1", 0))
        self._told, tell = os.pipe()
        os.set_blocking(self._told, False)
        self.told: list[str] = []
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                self._supervise(work, FakeNotifier(tell, watchdog))
            os._exit(99)
        os.close(tell)
        self._status: int | None = None

    def _supervise(self, work: Work, notifier: Notifier) -> None:
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        sys.stderr = sys.__stderr__  # pytest has put its own there
        logging.getLogger().handlers.clear()
        logs.setup("json", "info")
        loaded = load_settings(
            {}, {"MESH_WORKERS": "2", "MESH_DRAIN_TIMEOUT": "100ms"}, self.config
        )
        one = Supervisor(
            loaded.settings,
            {"outbound": self.sock},
            work=work,
            reread=Reread(loaded),
            notifier=notifier,
            ready_file=self.ready_file,
            bound={"outbound": "there", "inbound": None, "auth": None, "admin": None},
        )
        os._exit(one.run())

    def events(self, name: str) -> list[dict[str, object]]:
        if not self.log_file.exists():
            return []
        lines = map(json.loads, self.log_file.read_text().splitlines())
        return [line for line in lines if line["event"] == name]

    def workers(self) -> list[int]:
        found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return list(map(int, found))

    def heard(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            self.told += os.read(self._told, 65536).decode().splitlines()
        return self.told

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is not None

    def exit_status(self) -> int | None:
        until(self.ended)
        return self._status

    def close(self) -> None:
        if not self.ended():
            for pid in (self.pid, *self.workers()):
                os.kill(pid, signal.SIGKILL)
            self.exit_status()
        os.close(self._told)
        self.sock.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(work: Work, **options: float) -> Run:
        runs.append(Run(tmp_path, work, **options))
        return runs[-1]

    yield start
    for one in runs:
        one.close()


# Workers.


def serve(seat: Seat) -> int:
    """Be ready, tell of each reload, and end at SIGTERM."""
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    seat.line.ready()
    while signal.sigwait({signal.SIGTERM, signal.SIGHUP}) == signal.SIGHUP:
        seat.line.adopted()
        seat.line.reloaded()
    return 0


def stand_still(seat: Seat) -> int:
    """Be ready, and never end by oneself."""
    seat.line.ready()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while True:
        time.sleep(60)


def fail(seat: Seat) -> int:
    raise RuntimeError("cannot start")


def test_they_are_ready_together(run: Callable[..., Run], tmp_path: Path) -> None:
    def slowly(seat: Seat) -> int:
        until((tmp_path / "go").exists)
        return serve(seat)

    (tmp_path / "ready.json").write_text("left by another")
    one = run(slowly)
    until(lambda: len(one.events("worker_started")) == 2)
    assert not one.ready_file.exists()
    assert one.heard() == []
    (tmp_path / "go").touch()
    until(one.ready_file.exists)
    told = json.loads(one.ready_file.read_text())
    assert told == {
        "outbound": "there",
        "inbound": None,
        "auth": None,
        "admin": None,
        "pid": one.pid,
    }
    until(lambda: one.heard() == ["READY=1"])
    assert len(one.workers()) == 2


def test_one_of_two_is_not_enough(run: Callable[..., Run], tmp_path: Path) -> None:
    def only_one(seat: Seat) -> int:
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            time.sleep(60)
        return serve(seat)

    one = run(only_one)
    until((tmp_path / "first").exists)
    time.sleep(0.1)
    assert not one.ready_file.exists()
    assert one.heard() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_end(run: Callable[..., Run], number: signal.Signals, status: int) -> None:
    one = run(serve)
    until(one.ready_file.exists)
    workers = one.workers()
    one.signal(number)
    assert one.exit_status() == status
    assert not one.ready_file.exists()
    assert one.heard() == ["READY=1", "STOPPING=1"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert one.events("supervisor_stopped")
    assert not one.events("worker_died")


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(signal.SIGTERM, signal.SIGINT, 130), (signal.SIGINT, signal.SIGTERM, 143)],
)
def test_the_second_signal_ends_at_once(
    run: Callable[..., Run], first: signal.Signals, second: signal.Signals, status: int
) -> None:
    one = run(stand_still)
    until(one.ready_file.exists)
    workers = one.workers()
    one.signal(first)
    until(lambda: "STOPPING=1" in one.heard())
    started = time.monotonic()
    one.signal(second)
    assert one.exit_status() == status
    assert time.monotonic() - started < 3, "not by the drain timeout"
    until(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in workers))


def test_who_does_not_end_is_killed(run: Callable[..., Run]) -> None:
    one = run(stand_still)
    until(one.ready_file.exists)
    one.signal(signal.SIGTERM)
    assert one.exit_status() == 0
    assert len(one.events("workers_killed")) == 1


def test_who_cannot_start_is_tried_again_with_growing_pauses(run: Callable[..., Run]) -> None:
    one = run(fail)
    until(lambda: len(one.events("worker_died")) >= 6)
    for index in range(2):
        died = [line for line in one.events("worker_died") if line["worker"] == index]
        assert [line["restart_seconds"] for line in died[:3]] == [0.5, 1.0, 2.0]
        assert {line["exit_status"] for line in died} == {70}
    assert one.events("worker_failed")[0]["error"] == "RuntimeError('cannot start')"
    assert len(one.events("worker_started")) <= 8
    assert not one.ready_file.exists()
    one.signal(signal.SIGTERM)
    assert one.exit_status() == 0


def test_pauses_have_a_limit_and_end_with_steadiness() -> None:
    place = supervisor._Worker(0)
    pauses = []
    for _ in range(8):
        place.later(100.0)
        pauses.append(place.pause)
        assert place.start_at == 100.0 + place.pause
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_one_that_dies_after_a_while_is_replaced_at_once(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STEADY", 0.05)
    one = run(serve)
    until(one.ready_file.exists)
    time.sleep(0.1)
    victim = one.workers()[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(one.events("worker_started")) == 3)
    (died,) = one.events("worker_died")
    assert (died["pid"], died["exit_status"], died["restart_seconds"]) == (victim, -9, 0.0)
    assert one.ready_file.exists()


def test_a_fork_that_fails_is_tried_again(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, failures = os.fork, iter([False, True, False, False])
    """The first is the test's own, then the supervisor's."""

    def sometimes() -> int:
        if next(failures):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", sometimes)
    one = run(serve)
    until(one.ready_file.exists)
    (line,) = one.events("worker_not_started")
    assert (line["worker"], line["retry_seconds"]) == (0, 0.5)
    assert line["reason"] == "Resource temporarily unavailable"


def test_the_listeners_are_the_workers_alone_at_the_end(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    """Else callers would be accepted by nobody while a worker takes its time."""

    def leave(seat: Seat) -> int:
        seat.line.ready()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.sigwait({signal.SIGTERM})
        seat.sockets["outbound"].close()
        (tmp_path / f"closed-{os.getpid()}").touch()
        until((tmp_path / "go").exists)
        return 0

    one = run(leave)
    until(one.ready_file.exists)
    address = one.sock.getsockname()
    one.sock.close()
    socket.create_connection(address).close()
    one.signal(signal.SIGTERM)
    until(lambda: len(list(tmp_path.glob("closed-*"))) == 2)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    (tmp_path / "go").touch()
    assert one.exit_status() == 0


# Reloading.


def test_a_reload_reaches_all_and_is_over_when_all_are_done(run: Callable[..., Run]) -> None:
    one = run(serve)
    until(lambda: one.heard() == ["READY=1"])
    one.signal(signal.SIGHUP)
    until(lambda: len(one.heard()) == 3)
    assert one.heard() == ["READY=1", "RELOADING=1", "READY=1"]


def test_one_that_dies_in_a_reload_does_not_keep_it_from_ending(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    def one_dies(seat: Seat) -> int:
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            return serve(seat)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # which ends it
        seat.line.ready()
        time.sleep(60)
        return 1

    one = run(one_dies)
    until(lambda: one.heard() == ["READY=1"])
    one.signal(signal.SIGHUP)
    until(lambda: len(one.heard()) == 3)
    assert one.heard()[1:] == ["RELOADING=1", "READY=1"]


def test_a_successor_has_what_was_reloaded(run: Callable[..., Run], tmp_path: Path) -> None:
    """`work` sees it, since `reread` is the supervisor's: here by the level of its log."""

    def tell(seat: Seat) -> int:
        level = logging.getLogger("dstack_mesh").level
        (tmp_path / f"{os.getpid()}.level").write_text(str(level))
        return serve(seat)

    one = run(tell)
    until(one.ready_file.exists)
    one.config.write_text("[log]\nlevel = 'error'\n")
    one.signal(signal.SIGHUP)
    until(lambda: len(one.heard()) == 3)
    before = one.workers()
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(list(tmp_path.glob("*.level"))) == 3)
    (successor,) = set(one.workers()) - set(before)
    until(lambda: (tmp_path / f"{successor}.level").read_text() == str(logging.ERROR))


def test_who_comes_after_a_reload_that_found_nobody_is_told_of_it(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    def note(seat: Seat) -> int:
        signal.signal(signal.SIGHUP, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
        seat.line.ready()
        if signal.sigwait({signal.SIGTERM, signal.SIGHUP}) == signal.SIGHUP:
            (tmp_path / f"{os.getpid()}.hangup").touch()
        return 0

    one = run(note)
    until(one.ready_file.exists)
    for pid in one.workers():
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(one.events("worker_died")) == 2)
    one.signal(signal.SIGHUP)
    until(lambda: len(list(tmp_path.glob("*.hangup"))) == 2)
    until(lambda: one.heard() == ["READY=1", "RELOADING=1", "READY=1"])


# The watchdog.


def test_the_watchdog_is_fed_while_all_give_signs_of_life(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 20.0)

    def alive(seat: Seat) -> int:
        seat.line.ready()
        while not (seat.sockets and (tmp_path / str(os.getpid())).exists()):
            os.write(seat.line._descriptor, bytes([seat.line.index]) + supervisor.ALIVE)
            time.sleep(0.02)
        (tmp_path / "stopped").touch()
        time.sleep(60)
        return 0

    one = run(alive, watchdog=0.3)
    until(lambda: one.heard().count("WATCHDOG=1") > 5)
    victim = one.workers()[0]
    (tmp_path / str(victim)).touch()
    until((tmp_path / "stopped").exists)
    time.sleep(0.4)
    count = len(one.heard())
    time.sleep(0.2)
    assert len(one.heard()) == count, "one of them stands still"
    os.kill(victim, signal.SIGKILL)  # a place that nobody is in is no standstill
    until(lambda: len(one.heard()) > count + 3)


# The ready file.


def test_a_ready_file_that_cannot_be_written_ends_it(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "ready.json").mkdir()
    one = run(serve)
    assert one.exit_status() == 1
    (line,) = one.events("ready_file_failed")
    assert str(line["path"]).endswith("ready.json")
    assert "READY=1" not in one.heard()

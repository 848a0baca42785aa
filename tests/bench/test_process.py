from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.process import Process, eventually, running

WORK = """
import sys, time
def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
"""
CHILD = f"{WORK}work(0.2)\nprint(flush=True)\ninput()"
PARENT = f"""{WORK}
import subprocess
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
work(0.1)
print("done", flush=True)
child.wait()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running([sys.executable, "-c", PARENT], None, **pipes) as process:
        assert process.stdout is not None
        for _ in range(2):  # its own line and its child's, in either order
            process.stdout.readline()
        yield process
        assert process.stdin is not None
        process.stdin.close()  # the child ends with it


def test_the_cpu_time_of_children_counts(parent: subprocess.Popen[bytes]) -> None:
    process = Process([parent.pid])

    assert len(process.tree()) == 2
    assert 0.3 < process.cpu_seconds() < 3
    assert process.cpu_seconds() == pytest.approx(
        sum(process.cpu_seconds_of(pid) for pid in process.tree()), abs=0.05
    )


def test_memory_is_of_all_processes(parent: subprocess.Popen[bytes]) -> None:
    both = Process([parent.pid])
    child = Process([pid for pid in both.tree() if pid != parent.pid])

    assert both.rss_mb() > child.rss_mb() > 1
    assert both.memory_kb() > child.memory_kb() > 500


def test_open_files_and_threads_are_counted() -> None:
    ours = Process([os.getpid()])
    files, threads = ours.open_files(), ours.threads()
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    with Path(os.devnull).open():
        found = ours.open_files(), ours.threads()
    over.set()
    thread.join()

    assert found == (files + 1, threads + 1)


def test_a_peak_is_forgotten() -> None:
    ours = Process([os.getpid()])
    ballast = b"x" * (64 << 20)
    high = ours.peak_mb()
    del ballast
    ours.forget_peak()

    before = ours.peak_mb()
    assert high - before > 40
    ballast = b"x" * (48 << 20)
    assert 40 < ours.peak_mb() - before < 64, len(ballast)


def test_waiting_ends() -> None:
    with pytest.raises(RuntimeError, match="it never came"):
        eventually(lambda: False, 0.01, "it never came")


def test_a_program_ends_with_its_block() -> None:
    with running([sys.executable, "-c", "input()"], None, stdin=subprocess.PIPE) as process:
        assert process.poll() is None

    assert process.returncode is not None

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstack_mesh.ops import systemd
from dstack_mesh.ops.systemd import Notifier

SECONDS = 10


class Supervisor:
    """Has the socket that systemd would have."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(SECONDS)

    def told(self) -> list[str]:
        """Give the lines of the next datagram."""
        return self._socket.recv(65536).decode().split("\n")

    def nothing(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(65536)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            self._socket.settimeout(SECONDS)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def supervisor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Supervisor]:
    abstract = f"@dstack-mesh-test-{os.getpid()}-{time.monotonic_ns()}"
    one = Supervisor(abstract if request.param == "abstract" else str(tmp_path / "notify"))
    yield one
    one.close()


async def within(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


def test_a_whole_life(supervisor: Supervisor) -> None:
    notifier = Notifier.from_environ(supervisor.environ)
    notifier.reloading()
    notifier.reloaded()
    assert supervisor.nothing(), "a reload during the start would be taken for its end"
    notifier.ready()
    assert supervisor.told() == ["READY=1"]
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    first, second = supervisor.told()
    assert first == "RELOADING=1"
    name, _, number = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(number) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloaded()
    assert supervisor.told() == ["READY=1"]
    notifier.stopping()
    assert supervisor.told() == ["STOPPING=1"]
    notifier.close()
    notifier.stopping()
    assert supervisor.nothing()


async def test_the_status_is_told_when_it_changes(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "PULSE", 0.01)
    status = ["waiting for\nan identity"]
    asked = []

    def line() -> str:
        asked.append(status[0])
        return status[0]

    notifier = Notifier.from_environ(supervisor.environ)
    notifier.start(asyncio.get_running_loop(), line)
    assert supervisor.told() == ["STATUS=waiting for an identity"]
    await within(lambda: len(asked) > 5)
    assert supervisor.nothing()
    status[0] = "serving"
    notifier.ready()
    assert supervisor.told() == ["READY=1", "STATUS=serving"]
    notifier.close()
    count = len(asked)
    await asyncio.sleep(0.05)
    assert len(asked) == count


async def test_the_watchdog_is_fed_at_half_its_interval(supervisor: Supervisor) -> None:
    environ = {**supervisor.environ, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier.from_environ(environ)
    began = time.monotonic()
    notifier.start(asyncio.get_running_loop(), str)
    times = []
    for _ in range(4):
        assert await asyncio.to_thread(supervisor.told) == ["WATCHDOG=1"]
        times.append(time.monotonic() - began)
    assert times[0] < 0.1
    assert times[3] > 0.29, "three pauses of 100 ms"
    notifier.close()


async def test_a_loop_that_stands_still_feeds_no_watchdog(supervisor: Supervisor) -> None:
    notifier = Notifier.from_environ({**supervisor.environ, "WATCHDOG_USEC": "20000"})
    notifier.start(asyncio.get_running_loop(), str)
    assert supervisor.told() == ["WATCHDOG=1"]
    time.sleep(0.1)  # noqa: ASYNC251 - the standstill
    assert supervisor.nothing()
    notifier.close()


@pytest.mark.parametrize(
    "watchdog",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"},
    ],
)
async def test_no_watchdog_where_none_is_asked_of_us(
    supervisor: Supervisor, watchdog: dict[str, str]
) -> None:
    notifier = Notifier.from_environ({**supervisor.environ, **watchdog})
    notifier.start(asyncio.get_running_loop(), str)
    await asyncio.sleep(0.05)
    assert supervisor.nothing()
    notifier.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
async def test_without_a_supervisor_nothing_happens(environ: dict[str, str]) -> None:
    notifier = Notifier.from_environ(environ)
    notifier.start(asyncio.get_running_loop(), lambda: pytest.fail("asked"))
    notifier.ready()
    notifier.reloading()
    notifier.stopping()
    notifier.close()


def test_an_address_of_another_kind_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Notifier.from_environ({"NOTIFY_SOCKET": "vsock:2:9000"}).ready()
    assert [record.message for record in caplog.records] == ["systemd_notify_unusable"]


def test_a_supervisor_that_is_gone_is_told_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    with caplog.at_level(logging.WARNING):
        notifier.ready()
        notifier.stopping()
    assert [record.message for record in caplog.records] == ["systemd_notify_failed"]
    back = Supervisor(str(tmp_path / "gone"))
    notifier.ready()
    assert back.told() == ["READY=1"]
    back.close()
    notifier.ready()
    notifier.close()


async def test_a_supervisor_that_does_not_read_blocks_nobody(supervisor: Supervisor) -> None:
    notifier = Notifier.from_environ(supervisor.environ)
    began = time.monotonic()
    for _ in range(2000):
        notifier.ready()
    assert time.monotonic() - began < SECONDS
    notifier.close()

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from tests.integration.harness import eventually

from dstack_mesh.settings.load import load_settings
from dstack_mesh.workers.ledger import Ledger
from dstack_mesh.workers.mailbox import Mailbox, socket_pairs
from dstack_mesh.workers.seat import Line, Seat
from dstack_mesh.workers.shares import Shares


class Supervisor:
    """Holds the other ends."""

    def __init__(self) -> None:
        self._told, self.tell = os.pipe()
        self.life, self._our_life = os.pipe()
        os.set_blocking(self._told, False)
        os.set_blocking(self.tell, False)

    def heard(self) -> bytes:
        try:
            return os.read(self._told, 4096)
        except BlockingIOError:
            return b""

    def stop_reading(self) -> None:
        os.close(self._told)
        self._told = -1

    def end(self) -> None:
        os.close(self._our_life)
        self._our_life = -1

    def close(self) -> None:
        for descriptor in (self._told, self.tell, self.life, self._our_life):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    one = Supervisor()
    yield one
    one.close()


@pytest.fixture
def seat(supervisor: Supervisor) -> Iterator[Seat]:
    pairs = socket_pairs(1)
    ledger = Ledger(1)
    line = Line(supervisor.tell, 0, None, ledger)
    share_of = partial(Shares(1, ["admin"]).of, 0)
    yield Seat({}, line, Mailbox(0, pairs, ledger), ledger, supervisor.life, share_of)
    for sock in pairs[0]:
        sock.close()


def test_what_the_supervisor_is_told(supervisor: Supervisor) -> None:
    line = Line(supervisor.tell, 3, None, Ledger(4))
    line.ready()
    assert supervisor.heard() == b"\x03r"
    line.adopted()
    assert supervisor.heard() == b"\x03d"
    line.reloaded()
    assert supervisor.heard() == b"\x03l"


def test_what_it_knows_already_is_not_said(supervisor: Supervisor) -> None:
    line = Line(supervisor.tell, 3, None, Ledger(4))
    line.reloading()
    line.stopping()
    line.close()
    assert supervisor.heard() == b""


async def test_no_signs_of_life_where_none_are_asked_for(supervisor: Supervisor) -> None:
    line = Line(supervisor.tell, 0, None, Ledger(1))
    line.start(asyncio.get_running_loop(), str)
    await asyncio.sleep(0.02)
    assert supervisor.heard() == b""


async def test_signs_of_life_come_from_the_loop_until_the_end(supervisor: Supervisor) -> None:
    line = Line(supervisor.tell, 63, 0.01, Ledger(64))
    line.start(asyncio.get_running_loop(), str)
    heard = b""

    def several() -> bool:
        nonlocal heard
        heard += supervisor.heard()
        return heard.count(b"\x3fa") >= 3

    await eventually(several)
    assert heard.replace(b"\x3fa", b"") == b""
    line.close()
    supervisor.heard()
    await asyncio.sleep(0.05)
    assert supervisor.heard() == b""


def test_a_supervisor_that_does_not_read_or_is_gone_holds_nothing_up(
    supervisor: Supervisor,
) -> None:
    line = Line(supervisor.tell, 0, None, Ledger(1))
    os.write(supervisor.tell, bytes(1 << 20))
    with pytest.raises(BlockingIOError):
        os.write(supervisor.tell, b"full")
    line.ready()
    supervisor.stop_reading()
    line.ready()


async def test_how_it_is_is_left_for_the_supervisor(supervisor: Supervisor) -> None:
    ledger = Ledger(1)
    ledger.seat(0, is_taken=True)
    line = Line(supervisor.tell, 0, 0.01, ledger)
    how = "not ready: no certificate"
    line.start(asyncio.get_running_loop(), lambda: how)
    assert ledger.status() == "not ready: no certificate (1 workers)"
    how = "ready: app a"
    await eventually(lambda: "ready: app a" in ledger.status())
    line.close()
    for said, say in (("b", line.ready), ("c", line.stopping)):
        how = said
        say()
        assert ledger.status() == f"{said} (1 workers)"


async def test_the_end_of_the_supervisor_is_noticed_once(
    supervisor: Supervisor, seat: Seat
) -> None:
    ended: list[bool] = []
    seat.watch_supervisor(asyncio.get_running_loop(), lambda: ended.append(True))
    await asyncio.sleep(0.02)
    assert not ended
    supervisor.end()
    await eventually(lambda: bool(ended))
    await asyncio.sleep(0.02)
    assert ended == [True]


async def test_a_hangup_waits_for_its_handler(supervisor: Supervisor, seat: Seat) -> None:
    """As in a worker that has just been forked; by default it would end the process."""
    heard: list[bool] = []
    loop = asyncio.get_running_loop()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        # To this thread: another one of the test's process would take it.
        signal.pthread_kill(threading.get_ident(), signal.SIGHUP)
        loop.add_signal_handler(signal.SIGHUP, lambda: heard.append(True))
        seat.watch_supervisor(loop, lambda: None)
        await eventually(lambda: bool(heard))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        loop.remove_signal_handler(signal.SIGHUP)
        loop.remove_reader(supervisor.life)


async def test_only_a_reload_that_is_put_into_effect_is_told(
    supervisor: Supervisor, seat: Seat
) -> None:
    part = seat.reload_part()
    settings = load_settings({}, {}, None).settings
    change = await part.prepare(settings, settings)
    assert supervisor.heard() == b"", "another part may yet refuse"
    change()
    assert supervisor.heard() == b"\x00d"
    assert part.keys == ()


def test_the_sockets_are_there() -> None:
    with socket.socket() as sock:
        pairs = socket_pairs(1)
        share_of = partial(Shares(1, ["admin"]).of, 0)
        listeners: Any = {"admin": sock}
        ledger = Ledger(1)
        line = Line(0, 0, None, ledger)
        one = Seat(listeners, line, Mailbox(0, pairs, ledger), ledger, 0, share_of)
        assert one.sockets["admin"] is sock
        for each in pairs[0]:
            each.close()

"""The parent of the worker processes: binds, forks, replaces who dies, passes signals on.

It has no event loop and no threads, so that it can fork at any time. The sockets are bound once and
inherited: what waits in their queues is lost to nobody when a worker goes.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dstack_mesh import lifecycle
from dstack_mesh.listen import ListeningSocket
from dstack_mesh.log import event
from dstack_mesh.ops.systemd import Notifier
from dstack_mesh.settings.tree import Settings
from dstack_mesh.workers.ledger import Ledger
from dstack_mesh.workers.mailbox import Mailbox, socket_pairs
from dstack_mesh.workers.reread import Reread
from dstack_mesh.workers.seat import ADOPTED, ALIVE, LATER_HEARD, READY, RELOADED, Line, Seat
from dstack_mesh.workers.shares import Shares

log = logging.getLogger(__name__)

STEADY = 10.0
"""Seconds after which a worker that dies is replaced at once; sooner, there is a pause."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds, doubling."""

_GRACE = 5.0
"""Seconds beyond the drain timeout that workers have for their end."""

_EXIT_STATUS: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130}
_FAILED = 70
_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
_NEVER = float("inf")


@dataclass(slots=True)
class _Worker:
    """A worker's place, and who is in it."""

    index: int
    pid: int = 0
    """0: nobody."""
    started: float = 0.0
    pause: float = 0.0
    start_at: float = 0.0
    ready: bool = False
    reloaded: bool = True
    missed_reload: bool = False
    """Nobody was in it when there was one."""
    alive: float = 0.0

    def later(self, now: float) -> None:
        """Have the next one start when there has been a pause, longer each time."""
        self.pause = min(max(self.pause * 2, FIRST_PAUSE), LONGEST_PAUSE)
        self.start_at = now + self.pause


class Supervisor:
    """See the module. `run` does all of it."""

    def __init__(
        self,
        settings: Settings,
        sockets: Mapping[str, ListeningSocket],
        *,
        work: Callable[[Seat], int],
        reread: Reread,
        notifier: Notifier,
        ready_file: Path | None,
        bound: Mapping[str, str | None],
    ) -> None:
        """`work` is what a worker does, by what `reread` says then; it gives the exit status."""
        self._sockets = sockets
        self._drain_timeout = settings.drain_timeout
        self._work = work
        self._reread = reread
        self._notifier = notifier
        self._ready_file = ready_file
        self._bound = bound
        self._workers = [_Worker(index) for index in range(settings.workers)]
        self._pairs = socket_pairs(settings.workers)
        self._shares = Shares(settings.workers, list(sockets))
        self._ledger = Ledger(settings.workers)
        notifier.describe_by(self._ledger.status)
        self._told, self._tell = os.pipe()
        self._life, self._our_life = os.pipe()
        self._wake, self._wake_up = os.pipe()
        for descriptor in (self._told, self._tell, self._wake, self._wake_up):
            os.set_blocking(descriptor, False)
        self._is_ready = False
        self._is_reloading = False
        self._is_announced = False
        """SIGUSR1 has come: who comes later has to know of it too."""

        self._exit_status: int | None = None
        """None: nothing has told us to end."""
        self._kill_at = _NEVER

    def run(self) -> int:
        """Run the workers until told to end; give the exit status."""
        if self._ready_file is not None:
            lifecycle.remove_ready_file(self._ready_file)
        # What is here lives as long as the process. A collector that looks at it writes to it, and
        # each worker would have a copy of its own.
        gc.collect()
        gc.freeze()
        self._catch_signals()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ, self._signalled)
            selector.register(self._told, selectors.EVENT_READ, self._hear)
            while self._exit_status is None or any(one.pid for one in self._workers):
                self._start_due()
                for key, _ in selector.select(self._patience()):
                    key.data()
                self._kill_overdue()
        if self._ready_file is not None:
            lifecycle.remove_ready_file(self._ready_file)
        self._notifier.close()
        event(log, logging.INFO, "supervisor_stopped")
        return self._exit_status

    # Workers.

    def _start_due(self) -> None:
        now = time.monotonic()
        for one in self._workers:
            if self._exit_status is None and one.pid == 0 and one.start_at <= now:
                self._start(one, now)

    def _start(self, one: _Worker, now: float) -> None:
        one.started = one.alive = now
        one.ready, one.reloaded = False, True
        # Until the child has handlers of its own it would take signals for ours.
        signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT)
        self._ledger.seat(one.index, is_taken=True)
        try:
            one.pid = os.fork()
            if one.pid == 0:
                self._be_worker(one.index)
        except OSError as error:
            self._ledger.seat(one.index, is_taken=False)
            one.later(now)
            reason, pause = error.strerror or str(error), one.pause
            fields = {"worker": one.index, "reason": reason, "retry_seconds": pause}
            event(log, logging.ERROR, "worker_not_started", **fields)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _CAUGHT)
        event(log, logging.INFO, "worker_started", worker=one.index, pid=one.pid)
        if self._is_announced:
            os.kill(one.pid, signal.SIGUSR1)
        if one.missed_reload:
            one.missed_reload = False
            os.kill(one.pid, signal.SIGHUP)

    def _be_worker(self, index: int) -> None:
        """Do a worker's work in this process, which has just been forked, and end it."""
        status = _FAILED
        try:
            signal.set_wakeup_fd(-1)
            for number in _CAUGHT:
                signal.signal(number, signal.SIG_DFL)
            # By default these would end it: they wait until `Seat.watch_supervisor`.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_CAUGHT} - {*LATER_HEARD})
            for descriptor in (self._told, self._our_life, self._wake, self._wake_up):
                os.close(descriptor)
            pulse = self._notifier.pulse
            line = Line(self._tell, index, pulse / 2 if pulse else None, self._ledger)
            mailbox = Mailbox(index, self._pairs, self._ledger)
            share_of = functools.partial(self._shares.of, index)
            seat = Seat(self._sockets, line, mailbox, self._ledger, self._life, share_of)
            status = self._work(seat)
        except BaseException as error:
            event(log, logging.ERROR, "worker_failed", worker=index, error=repr(error))
        finally:
            os._exit(status)

    def _reap(self) -> None:
        for one in self._workers:
            if one.pid == 0:
                continue
            pid, status = os.waitpid(one.pid, os.WNOHANG)
            if pid == 0:
                continue
            now = time.monotonic()
            one.pid, one.reloaded = 0, True
            self._shares.clear(one.index)
            self._ledger.seat(one.index, is_taken=False)
            if self._exit_status is not None:
                continue
            if now - one.started < STEADY:
                one.later(now)
            else:
                one.pause, one.start_at = 0.0, now
            event(
                log,
                logging.ERROR,
                "worker_died",
                worker=one.index,
                pid=pid,
                exit_status=os.waitstatus_to_exitcode(status),
                restart_seconds=one.pause,
            )
            self._perhaps_reloaded()

    # What comes in.

    def _hear(self) -> None:
        """Take what workers say, two bytes each; a pipe keeps such short writes whole."""
        said = os.read(self._told, 4096)
        for at in range(0, len(said) - 1, 2):
            one, what = self._workers[said[at]], said[at + 1 : at + 2]
            one.alive = time.monotonic()
            if what == READY:
                one.ready = True
                self._perhaps_ready()
            elif what == ADOPTED:
                self._reread.adopt()
            elif what == RELOADED:
                one.reloaded = True
                self._perhaps_reloaded()
            elif what == ALIVE:
                self._notifier.describe()
                if self._all_alive():
                    self._notifier.beat()

    def _perhaps_ready(self) -> None:
        if self._is_ready or not all(one.ready for one in self._workers):
            return
        self._is_ready = True
        if self._ready_file is not None:
            try:
                lifecycle.write_ready_file(self._ready_file, self._bound)
            except OSError as error:
                path = str(self._ready_file)
                event(log, logging.ERROR, "ready_file_failed", path=path, reason=str(error))
                self._end(1)  # whoever waits for the file would wait for ever
                return
        self._notifier.ready()

    def _perhaps_reloaded(self) -> None:
        if self._is_reloading and all(one.reloaded for one in self._workers):
            self._is_reloading = False
            self._notifier.reloaded()

    def _all_alive(self) -> bool:
        pulse = self._notifier.watchdog
        now = time.monotonic()
        # A place that nobody is in will be taken again: that is no standstill.
        there = [one for one in self._workers if one.pid]
        return pulse is not None and all(now - one.alive < pulse for one in there)

    # Signals.

    def _catch_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_up, warn_on_full_buffer=False)
        for number in _CAUGHT:
            signal.signal(number, lambda number, frame: None)  # the descriptor tells

    def _signalled(self) -> None:
        for number in os.read(self._wake, 4096):
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGUSR1:
                self._is_announced = True
                self._send(signal.SIGUSR1)
            elif number == signal.SIGHUP:
                self._reload()
            elif number in _EXIT_STATUS:
                if self._exit_status is not None:
                    self._send(signal.SIGKILL)
                    os._exit(128 + number)
                self._end(_EXIT_STATUS[number])

    def _reload(self) -> None:
        if self._exit_status is not None:
            return
        self._is_reloading = True
        self._notifier.reloading()
        self._reread.look()
        for one in self._workers:
            one.reloaded = one.pid == 0
            one.missed_reload = one.pid == 0
        self._send(signal.SIGHUP)
        self._perhaps_reloaded()

    def _end(self, exit_status: int) -> None:
        self._exit_status = exit_status
        self._kill_at = time.monotonic() + self._drain_timeout + _GRACE
        self._notifier.stopping()
        for sock in self._sockets.values():
            sock.close()  # what only we held open would take callers and answer none
        self._send(signal.SIGTERM)

    def _kill_overdue(self) -> None:
        if time.monotonic() >= self._kill_at:
            self._kill_at = _NEVER
            event(log, logging.ERROR, "workers_killed", reason="they did not end in time")
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for one in self._workers:
            if one.pid:
                os.kill(one.pid, number)

    def _patience(self) -> float | None:
        """Give the seconds until something is due; None: nothing is."""
        due = [self._kill_at]
        if self._exit_status is None:
            due = [one.start_at for one in self._workers if one.pid == 0]
        first = min(due, default=_NEVER)
        return max(0.0, first - time.monotonic()) if first < _NEVER else None

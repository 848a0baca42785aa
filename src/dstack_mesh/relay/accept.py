"""Accepting connections: one way for all listeners, a bounded number in a turn of the loop.

Where descriptors run short, accepting pauses before there is none left: what has been accepted
still needs some, to reach where its requests go. Who comes then waits in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable
from typing import Protocol

from dstack_mesh.log import event

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds without accepting, again and again until there are descriptors."""

CALM = 5.0
"""Seconds without a pause after which a shortage is over: one that comes and goes is one."""

OTHERS_TURN = 0.002
"""Seconds that another worker has for what is left to it.

Then one connection is taken all the same, and twice as many each time that the other has still not
come: it may be busy, or stand still."""

PER_TURN = 16
"""Connections that cost little, accepted before others have their turn."""

_GIVING_WAY = 16
"""Idle connections that may give way to newcomers in each pause."""

_MOST_SPARE = 256

# What accept(2) tells of the connection that it would have given: the next may be well.
_OF_ONE_CONNECTION = frozenset(
    (
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPROTO,
        errno.ETIMEDOUT,
    )
)
_HINTS = {
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the whole system has no more open files (fs.file-max)",
    errno.ENOBUFS: "the system has no memory for sockets",
    errno.ENOMEM: "the system has no memory for sockets",
}

Take = Callable[[socket.socket], None]
"""Takes an accepted, non-blocking socket; it is the taker's to close."""


def spare_descriptors(shares: int) -> int:
    """Give how many descriptors, of those this process may have, `shares` of the reserve are.

    A listener leaves its shares to others: what it accepted, and listeners that leave fewer. So a
    flood of one cannot keep the others from being served.
    """
    return shares * min(_MOST_SPARE, _most_open_files() // 8)


def _most_open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 - 1 if soft == resource.RLIM_INFINITY else soft


class Yielding(Protocol):
    """Has connections that may give way."""

    def give_way(self) -> bool:
        """End the one that has waited longest for a request; `False`: none has waited for long."""
        ...


class Share(Protocol):
    """A worker's share of a listener at which several accept."""

    def is_others_turn(self) -> bool:
        """Tell the others how many we have, and whether the next should be for one of them."""
        ...

    def leave(self) -> None:
        """Tell the others that we accept no more."""
        ...


class Acceptor:
    """Accepts on one listening, non-blocking socket, which stays the caller's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        listener: str,
        take: Take,
        *,
        per_turn: int = PER_TURN,
        spare: int = 0,
        yielding: Yielding | None = None,
        share: Share | None = None,
    ) -> None:
        """`listener` names it in logs. The last `spare` descriptors are left to others.

        Connections of `yielding` may have to end where descriptors are short. `share` is None where
        nobody else accepts on `sock`.
        """
        self._share = share
        self._leaving: asyncio.TimerHandle | None = None
        self._unclaimed = 1
        self._loop = loop
        self._sock = sock
        self._listener = listener
        self._take = take
        self._per_turn = per_turn
        # The kernel gives the lowest number that is free, so a high one says how few are left.
        self._enough = max(0, _most_open_files() - spare)
        self._yielding = yielding
        self._timer: asyncio.TimerHandle | None = None
        self._started = False
        self._pauses = 0
        self._short_since = 0.0

    def start(self) -> None:
        """Begin to accept."""
        self._started = True
        if self._share is not None:
            self._share.is_others_turn()  # which tells them that we are there
        self._loop.add_reader(self._sock, self._readable)

    def stop(self) -> None:
        """Stop accepting. Connections in the kernel's queue end when the socket is closed."""
        if self._started:
            self._started = False
            self._loop.remove_reader(self._sock)
            self._cancel_timer()
            if self._leaving is not None:
                self._leaving.cancel()
            if self._share is not None:
                self._share.leave()

    def _readable(self) -> None:
        self._accept(self._per_turn, self._share)

    def _leave_to_others(self) -> None:
        """Look away, or the loop would turn for nothing: it tells for as long as somebody waits."""
        self._loop.remove_reader(self._sock)
        self._leaving = self._loop.call_later(OTHERS_TURN, self._look_again)

    def _look_again(self) -> None:
        """Take some of those whom nobody else has taken."""
        self._leaving = None
        self._loop.add_reader(self._sock, self._readable)
        most = self._unclaimed
        self._unclaimed = min(2 * most, self._per_turn)
        self._accept(most, None)

    def _accept(self, most: int, share: Share | None) -> None:
        for _ in range(most):
            if share is not None and share.is_others_turn():
                self._leave_to_others()
                return
            try:
                accepted, _ = self._sock.accept()
            except BlockingIOError:
                self._unclaimed = 1  # all have been taken, by whomever
                return
            except OSError as error:
                if error.errno in _OF_ONE_CONNECTION:
                    continue
                self._pause(error.errno or 0)
                return
            number = accepted.fileno()
            accepted.setblocking(False)
            self._take(accepted)
            if number >= self._enough:
                self._pause(errno.EMFILE)
                return

    def _pause(self, number: int) -> None:
        self._loop.remove_reader(self._sock)
        self._cancel_timer()
        self._timer = self._loop.call_later(PAUSE, self._resume)
        self._pauses += 1
        if self._pauses > 1:
            return
        # Said once, however long it lasts.
        self._short_since = self._loop.time()
        reason = os.strerror(number)
        if number in _HINTS:
            reason += f"; {_HINTS[number]}"
        event(log, logging.WARNING, "accept_paused", listener=self._listener, reason=reason)

    def _resume(self) -> None:
        for _ in range(_GIVING_WAY):
            if self._has_descriptors() or self._yielding is None or not self._yielding.give_way():
                break
        if self._has_descriptors():
            self._loop.add_reader(self._sock, self._readable)
            self._timer = self._loop.call_later(CALM, self._over)
        else:
            self._pauses += 1
            self._timer = self._loop.call_later(PAUSE, self._resume)

    def _has_descriptors(self) -> bool:
        try:
            probe = os.dup(self._sock.fileno())
        except OSError:
            return False
        os.close(probe)
        return probe < self._enough

    def _over(self) -> None:
        self._timer = None
        seconds = round(self._loop.time() - self._short_since, 1)
        pauses, self._pauses = self._pauses, 0
        event(
            log,
            logging.INFO,
            "accept_resumed",
            listener=self._listener,
            pauses=pauses,
            seconds=seconds,
        )

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

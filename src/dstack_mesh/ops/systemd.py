"""What systemd is told: ready, reloading, stopping, a line of status, and that we are alive.

The protocol is sd_notify(3): lines of `NAME=value` in one datagram to the socket that
`NOTIFY_SOCKET` names. Where that variable is absent nothing is sent, and nothing here ever fails:
a supervisor that cannot be told is no reason to stop serving.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from dstack_mesh.log import event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

PULSE = 5.0
"""Seconds at most between two looks at whether the status has changed."""

_LONGEST_STATUS = 500


class Notifier:
    """Tells the supervisor at `address` (`/path`, or `@name` for an abstract socket).

    `watchdog` is the interval in seconds after which systemd takes us for dead, None for none.
    """

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        self._address = address
        self._watchdog = watchdog if address is not None else None
        self._socket: socket.socket | None = None
        self._failed = False
        self._is_up = False
        self._status: Callable[[], str] = str
        self._told = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Notifier:
        """Make one from `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` (sd_watchdog_enabled).

        What cannot be used is told in the log.
        """
        address = environ.get("NOTIFY_SOCKET") or None
        if address is not None and not address.startswith(("/", "@")):
            event(
                log,
                logging.WARNING,
                "systemd_notify_unusable",
                address=address,
                reason="accepted is an absolute path or @name",
            )
            address = None
        return cls(address, _watchdog(environ))

    def start(self, loop: asyncio.AbstractEventLoop, status: Callable[[], str]) -> None:
        """Keep the status line and the watchdog current from `loop`, so that its standstill shows.

        `status` gives one line for people; it is asked about every `PULSE` seconds.
        """
        if self._address is None:
            return
        self._loop = loop
        self.describe_by(status)
        self._pulse()

    def ready(self) -> None:
        """Say that the start is over."""
        self._is_up = True
        self._send("READY=1", *self._new_status())

    def reloading(self) -> None:
        """Say that the settings are being read again; `reloaded` has to follow."""
        if self._is_up:  # what systemd hears next would else be that the start is over
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """Say that the reload is over, whatever came of it: we serve as before or anew."""
        if self._is_up:
            self._send("READY=1", *self._new_status())

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1", *self._new_status())

    @property
    def pulse(self) -> float | None:
        """Seconds at most between two looks at how we are; None: nobody is to be told."""
        if self._address is None:
            return None
        # Half the interval, as sd_watchdog_enabled(3) advises.
        return min(PULSE, self._watchdog / 2) if self._watchdog is not None else PULSE

    @property
    def watchdog(self) -> float | None:
        """Seconds without `beat` after which systemd takes us for dead; None: it does not look."""
        return self._watchdog

    def beat(self) -> None:
        """Say that we are alive, where `start` does not: where there is no event loop."""
        self._send("WATCHDOG=1")

    def describe_by(self, status: Callable[[], str]) -> None:
        """Have `status` asked for the line of status, from now on."""
        self._status = status

    def describe(self) -> None:
        """Say how we are where that has changed; for where there is no event loop."""
        self._send(*self._new_status())

    def close(self) -> None:
        """Say nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._socket.close()
        self._address = self._timer = self._socket = None

    def _pulse(self) -> None:
        lines = self._new_status()
        if self._watchdog is not None:
            lines.append("WATCHDOG=1")
        self._send(*lines)
        pause = self.pulse
        if self._loop is not None and pause is not None:
            self._timer = self._loop.call_later(pause, self._pulse)

    def _new_status(self) -> list[str]:
        status = " ".join(self._status().split())[:_LONGEST_STATUS]
        if status == self._told:
            return []
        self._told = status
        return [f"STATUS={status}"]

    def _send(self, *lines: str) -> None:
        if self._address is None or not lines:
            return
        try:
            if self._socket is None:
                self._socket = _connected(self._address)
            self._socket.send("\n".join(lines).encode("utf-8", "backslashreplace"))
        except OSError as error:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            if not self._failed:  # once; a supervisor that is gone would be told of for ever
                self._failed = True
                event(
                    log,
                    logging.WARNING,
                    "systemd_notify_failed",
                    address=self._address,
                    reason=error.strerror or str(error),
                )


def _connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except BaseException:
        sock.close()
        raise
    return sock


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """Give the watchdog's interval in seconds, None where there is none or it is another's."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (usec.isascii() and usec.isdigit()) or int(usec) == 0:
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(usec) / 1_000_000

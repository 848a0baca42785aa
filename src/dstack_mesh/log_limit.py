"""Log events that a stranger can cause: logged always, but no more than so many of them.

    denials = LogLimit(log, "policy_denied")
    denials.event(logging.WARNING, caller, app=caller, path=path)

What is over the limit is counted, and told when the window ends: `events_left_out`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from dstack_mesh.log import event

_MAX_KEYS = 256
_OTHERS = "others"


class LogLimit:
    """Logs one kind of event: the first `burst` of each key in every `window` of seconds.

    A key says whose doing an event is, so that one who is loud cannot silence what is told of
    another; the 256 keys that come first in a window have a count of their own, the rest share
    one. Nothing is kept beyond a window.
    """

    def __init__(
        self,
        logger: logging.Logger,
        name: str,
        *,
        burst: int = 10,
        window: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._name = name
        self._burst = burst
        self._window = window
        self._clock = clock
        self._ends = 0.0
        self._seen: dict[str, int] = {}
        self._left_out = 0
        self._timer: asyncio.TimerHandle | None = None

    def event(self, level: int, key: str, /, **fields: object) -> None:
        """Log the event with `fields`, or count it as left out; for what is in them see `log`."""
        if not self._logger.isEnabledFor(level):
            return
        now = self._clock()
        if now >= self._ends:
            self.flush()
            self._ends = now + self._window
        seen = self._seen
        if key not in seen and len(seen) >= _MAX_KEYS:
            key = _OTHERS
        count = seen[key] = seen.get(key, 0) + 1
        if count <= self._burst:
            event(self._logger, level, self._name, **fields)
            return
        self._left_out += 1
        if self._timer is None:
            self._tell_later(self._ends - now)

    def flush(self) -> None:
        """Tell what was left out so far, and begin to count anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._left_out:
            over = {k: n - self._burst for k, n in self._seen.items() if n > self._burst}
            most = sorted(over.items(), key=lambda item: -item[1])[:10]
            event(
                self._logger,
                logging.WARNING,
                "events_left_out",
                of=self._name,
                count=self._left_out,
                seconds=self._window,
                most_by=dict(most),
            )
        self._left_out = 0
        self._seen.clear()

    def _tell_later(self, seconds: float) -> None:
        """Have the count told even if no such event comes any more."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a command without a loop: the next event tells it
            return
        self._timer = loop.call_later(seconds, self.flush)

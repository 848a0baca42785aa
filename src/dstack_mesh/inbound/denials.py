"""What policy did not let through, in the log: who, what, which rule; and not a line for each.

A caller that is denied again and again must not fill a disk, nor hide another caller's denial. So
there is a limit for each caller and rule, and the next line says how many were left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dstack_mesh.log import event
from dstack_mesh.model import PeerIdentity
from dstack_mesh.policy.decide import Decision

log = logging.getLogger(__name__)

_BURST = 10
"""Lines for one caller and rule in one window."""

_WINDOW = 10.0
"""Seconds."""

_MAX_SEEN = 1024
_SHOWN = 200
"""Bytes of a path in a line."""


class _Seen:
    """What was logged of one caller and rule in the window that began at `since`."""

    __slots__ = ("left_out", "lines", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.lines = 0
        self.left_out = 0


class DenialLog:
    """Logs denials (`policy_denied`) and what was only audited (`policy_audited`), as warnings."""

    __slots__ = ("_clock", "_seen")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, str | None, bool], _Seen] = {}

    def add(
        self,
        decision: Decision,
        caller: PeerIdentity,
        method: bytes,
        target: bytes,
        request_id: bytes = b"",
    ) -> None:
        """Log `decision`, or count it. `target` is shown without its query, which may be secret."""
        now = self._clock()
        key = (caller.app_id, decision.rule, decision.audited)
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            seen = self._seen[key] = _Seen(now)
        elif now - seen.since >= _WINDOW:
            seen.since, seen.lines = now, 0
        if seen.lines >= _BURST:
            seen.left_out += 1
            return
        seen.lines += 1
        path = target.partition(b"?")[0]
        fields: dict[str, object] = {
            "caller": caller.app_id,
            "rule": decision.rule,
            "method": method.decode("latin-1"),
            "path": path[:_SHOWN].decode("latin-1"),
            "why": decision.why,
        }
        if caller.app_info is not None:
            fields["instance"] = caller.app_info.instance_id
        if request_id:
            fields["request_id"] = request_id.decode("latin-1")
        if seen.left_out:
            fields["left_out"] = seen.left_out
            seen.left_out = 0
        name = "policy_audited" if decision.audited else "policy_denied"
        event(log, logging.WARNING, name, **fields)

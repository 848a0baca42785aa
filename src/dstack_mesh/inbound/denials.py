"""What policy did not let through, in the log: who, what, which rule; and not a line for each.

A caller that is denied again and again must not fill a disk, nor hide another caller's denial: the
limit is for each caller and rule.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from dstack_mesh.log_limit import LogLimit
from dstack_mesh.model import PeerIdentity
from dstack_mesh.policy.decide import Decision

log = logging.getLogger(__name__)

_SHOWN = 200
"""Bytes of a path in a line."""


class DenialLog:
    """Logs denials (`policy_denied`) and what was only audited (`policy_audited`), as warnings."""

    __slots__ = ("_audited", "_denied")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._denied = LogLimit(log, "policy_denied", clock=clock)
        self._audited = LogLimit(log, "policy_audited", clock=clock)

    def add(
        self,
        decision: Decision,
        caller: PeerIdentity,
        method: bytes,
        target: bytes,
        request_id: bytes = b"",
    ) -> None:
        """Log `decision`, or count it. `target` is shown without its query, which may be secret."""
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
        limited = self._audited if decision.audited else self._denied
        whose = caller.app_id if decision.rule is None else f"{caller.app_id} by {decision.rule}"
        limited.event(logging.WARNING, whose, **fields)

"""Which process runs on which cores: the proxy under test on one, all others on the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["subject", "load"] | None
"""`None` is a process that the scheduler may put anywhere."""


@dataclass(frozen=True)
class Layout:
    """Lists of cores as `taskset -c` reads them; `None` where nothing is pinned."""

    subject: str | None
    load: str | None

    def pin(self, command: Sequence[str], role: Role) -> list[str]:
        """Put `taskset` before a command; it replaces itself, so the process id stays."""
        cores = {"subject": self.subject, "load": self.load, None: None}[role]
        return [*([] if cores is None else ["taskset", "-c", cores]), *command]


def split(available: Sequence[int]) -> Layout:
    """Give the first core to the subject and the others to the load; nothing where there is one."""
    if len(available) < 2:
        return Layout(None, None)
    first, *others = sorted(available)
    return Layout(str(first), ",".join(map(str, others)))


LAYOUT = split(sorted(os.sched_getaffinity(0)) if shutil.which("taskset") else [])

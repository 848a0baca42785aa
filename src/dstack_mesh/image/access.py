"""Whether a process that is not root can use a file of the host's, and by which group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE, SEARCH = 0o4, 0o2, 0o1
"""Bits of a mode's last digit. To connect to a unix socket is to write to it (unix(7))."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a file can be used by another user than its owner."""

    groups: frozenset[int] = frozenset()
    """Groups that this user has to be in."""

    only_by: tuple[int, int] | None = None
    """User and group that can use it, where no other may be let in: its owner."""


def access(path: str, bit: int, stat: Callable[[str], os.stat_result] = os.stat) -> Access | None:
    """Tell how `path` can be used for `bit`, directories on the way included; None: not there.

    A file for root's group alone counts as root's: to be in that group is to be too much.
    """
    resolved = os.path.realpath(path)
    try:
        steps = [(stat(str(parent)), SEARCH) for parent in Path(resolved).parents]
        file = stat(resolved)
    except OSError:
        return None
    groups = set()
    for found, needed in [*steps, (file, bit)]:
        if found.st_mode & needed:
            continue
        if not found.st_mode & (needed << 3) or found.st_gid == 0:
            return Access(only_by=(file.st_uid, file.st_gid))
        groups.add(found.st_gid)
    return Access(frozenset(groups))

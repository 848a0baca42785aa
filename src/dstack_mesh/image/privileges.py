"""Giving up root: the command line that runs another as a user without any privilege."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_mesh.model import Address, TcpAddress

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FIRST_OPEN_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


@dataclass(frozen=True, slots=True)
class User:
    """Whom a process runs as, by number."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    """Groups beside `gid`."""


def as_user(user: User, command: Sequence[str], *, low_ports: bool = False) -> list[str]:
    """Give the command line that runs `command` as `user`, for a caller that is root.

    It can never get more rights than it has (no_new_privs, an empty bounding set). With
    `low_ports` the one capability CAP_NET_BIND_SERVICE stays.
    """
    kept = "-all,+net_bind_service" if low_ports else "-all"
    groups = sorted(user.groups - {user.gid})
    return [
        "setpriv",
        f"--reuid={user.uid}",
        f"--regid={user.gid}",
        f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
        f"--inh-caps={kept}",
        f"--ambient-caps={kept}",
        f"--bounding-set={kept}",
        "--no-new-privs",
        "--",
        *command,
    ]


def needs_low_ports(addresses: Iterable[Address | None], first_open: int | None = None) -> bool:
    """Tell whether one of `addresses` has a port that only a privileged process may bind.

    `first_open` is the first port for everybody; by default what this kernel says, which in a
    container of docker's own network is 0 since docker 20.10.
    """
    first = _first_open_port() if first_open is None else first_open
    return any(isinstance(one, TcpAddress) and 0 < one.port < first for one in addresses)


def _first_open_port() -> int:
    try:
        return int(_FIRST_OPEN_PORT.read_text())
    except (OSError, ValueError):
        return 1024

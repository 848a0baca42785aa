"""Finds loopback addresses and ports for apps that are started later, by somebody else."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from dstack_mesh.model import AppId

# Below what Linux hands out to outgoing connections, so that none of them takes a port between
# now and the sidecar's start.
_FIRST, _LAST = 15_000, 31_999
_ATTEMPTS = 500


def loopback_host(app_id: AppId, taken: Collection[str]) -> str:
    """Pick an address of 127.0.0.0/8 for the app, the same each time unless it is taken."""
    one, two, three = bytes.fromhex(app_id)[:3]
    for step in range(250):
        # 127.0.0.x is left to everybody's other programs.
        host = f"127.{one % 254 + 1}.{two}.{(three + step) % 253 + 2}"
        if host not in taken:
            return host
    raise OSError("no loopback address is left for one more app")


def common_port(hosts: Sequence[str], taken: Collection[int] = ()) -> int:
    """Return a TCP port that is free on every one of `hosts` right now, and not `taken`.

    Raises `OSError` where a host is no address of this machine, or nothing is free.
    """
    for _ in range(_ATTEMPTS):
        port = random.randint(_FIRST, _LAST)  # noqa: S311 - nothing to guess, only to spread
        if port not in taken and all(_is_free(host, port) for host in hosts):
            return port
    raise OSError(f"no TCP port from {_FIRST} to {_LAST} is free on {', '.join(hosts)}")


def _is_free(host: str, port: int) -> bool:
    with contextlib.closing(_bindable(host)) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            if is_local(host):
                return False
            raise OSError(f"{host} is not an address of this machine: {error}") from error
    return True


def is_local(host: str) -> bool:
    """Tell whether `host` is an address (not a name) that this machine can listen on."""
    try:
        with contextlib.closing(_bindable(host)) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _bindable(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)

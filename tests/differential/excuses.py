"""What peers refuse although it is valid, each with the reason: no disagreement in boundaries.

A refusal is one message to the peer too: it answers it, and mostly closes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dstack_mesh.relay.exchange import Exchange
from tests.differential.account import Meant, Seen


@dataclass(frozen=True)
class Refusal:
    """One thing that a peer is known to refuse."""

    peer: str
    status: int
    reason: str
    applies: Callable[[Meant], bool]


def _field(message: Meant, name: bytes) -> list[bytes]:
    return re.findall(rb"(?i)\r\n%b: ([^\r\n]*)" % re.escape(name), message.head)


def _unusual_method(message: Meant) -> bool:
    return re.fullmatch(r"[A-Z_-]+", message.method) is None


def _bad_escape(message: Meant) -> bool:
    path = message.target.partition("?")[0]
    return re.search(r"%(?![0-9A-Fa-f]{2})|%00", path) is not None


def _above_the_root(message: Meant) -> bool:
    depth = 0
    for segment in re.split("/+", message.target.partition("?")[0])[1:]:
        depth += {"..": -1, ".": 0, "": 0}.get(segment, 1)
        if depth < 0:
            return True
    return False


def _short_websocket_key(message: Meant) -> bool:
    keys = _field(message, b"sec-websocket-key")
    return bool(_field(message, b"upgrade")) and [len(key) for key in keys] != [24]


REFUSALS = (
    Refusal("nginx", 405, "nginx serves no TRACE", lambda m: m.method == "TRACE"),
    Refusal("nginx", 400, "nginx has no asterisk-form", lambda m: m.target == "*"),
    Refusal("nginx", 400, "nginx takes methods of A to Z, `_` and `-` only", _unusual_method),
    Refusal(
        "nginx", 400, "nginx decodes paths, and %00 or half an escape it will not", _bad_escape
    ),
    Refusal("nginx", 400, "nginx resolves dot segments, and there is none above", _above_the_root),
    Refusal("nginx", 400, "nginx wants a host in Host", lambda m: _field(m, b"host") == [b""]),
    Refusal(
        "nginx",
        400,
        "nginx takes one Expect field",
        lambda m: len(_field(m, b"expect")) > 1,
    ),
    Refusal("haproxy", 400, "HAProxy checks the length of a WebSocket's key", _short_websocket_key),
)


def excuse(peer: str, message: Meant, seen: Seen) -> str | None:
    """Give the reason for which `peer` may have refused the message."""
    for one in REFUSALS:
        if (one.peer, one.status) == (peer, seen.status) and one.applies(message):
            return one.reason
    return None


def excuse_front(front: str, exchange: Exchange) -> str | None:
    """Give the reason for which a proxy before the mesh cannot read what the mesh passed on."""
    response = exchange._response
    if front == "nginx" and response is not None and response._interims:
        return (
            "nginx before 1.29 knows no interim responses: it takes the first for the final one,"
            " and what follows for its body; it does not use the connection again"
        )
    return None

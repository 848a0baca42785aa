"""The admin listener: is the process alive, is the mesh ready, what does it do (interface.md)."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence

from dstack_mesh.model import Address, UnixAddress
from dstack_mesh.ops.families import exposition
from dstack_mesh.ops.merge import merge_reports
from dstack_mesh.ops.page import page
from dstack_mesh.ops.report import WorkerReport
from dstack_mesh.relay.answers import Answer, json_answer
from dstack_mesh.relay.interfaces import Decision, Handler, Plan
from dstack_mesh.relay.lane import Route
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import RequestLine

Collect = Callable[[bool], Awaitable[Sequence[WorkerReport]]]
"""Asks every worker process for its report; with True the backend's port is asked too."""

_HOST = b"host"
_NOTHING: frozenset[bytes] = frozenset()
_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_FRESH = b"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
_OPEN = ("/livez", "/readyz", "/readyz/inbound", "/metrics")
_LOCAL = ("/status", "/")


class Admin(Handler[Plan]):
    """The handler of all connections of the admin listener."""

    def __init__(self, collect: Collect, address: Address) -> None:
        """`address` is where it listens: it decides over what is served, and to whom."""
        self._collect = collect
        self._paths = (*_OPEN, *_LOCAL) if is_loopback(address) else _OPEN
        # A web site could have its name lead to 127.0.0.1 and then read what is here.
        self._checks_host = not isinstance(address, UnixAddress)

    def plan(self, line: RequestLine, block: bytes) -> Plan:
        """See `Handler`."""
        return Plan(parse_request_fields(block, line.minor, _NOTHING, line.authority))

    def route(self, line: RequestLine, plan: Plan, last: Route | None = None) -> Decision:
        """See `Handler`."""
        path = line.target.partition(b"?")[0].decode("latin-1")
        if line.method not in (b"GET", b"HEAD"):
            return Answer(405, b"GET and HEAD only\n", _TEXT, fields=b"Allow: GET, HEAD\r\n")
        if path == "/livez":
            return Answer(200, b"OK\n", _TEXT)
        if path not in self._paths:
            here = ", ".join(self._paths)
            return Answer(404, f"here are {here}\n".encode(), _TEXT)
        host = plan.fields.host
        if path in _LOCAL and self._checks_host and host is not None and not is_own_name(host):
            return Answer(
                421,
                b"This page answers to localhost or an IP address as Host only, so that no web site"
                b" can read it through a browser.\n",
                _TEXT,
            )
        if path == "/":
            return page()
        return self._answer(path)

    async def _answer(self, path: str) -> Answer:
        found = merge_reports(await self._collect(path in ("/readyz/inbound", "/status")))
        if path == "/metrics":
            return Answer(200, exposition(found.metrics).encode(), _METRICS, fields=_FRESH)
        if path == "/status":
            answer = json_answer(200, found.status)
        else:
            readiness = found.status.readiness
            answer = json_answer(200 if readiness.ready else 503, readiness)
        answer.fields += _FRESH
        return answer


def is_own_name(host: bytes) -> bool:
    """Tell whether `host` (RFC 9110 7.2) is a name that no stranger's site can have."""
    name = host.decode("latin-1").lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: Address) -> bool:
    """Tell whether only this machine can reach `address`."""
    if isinstance(address, UnixAddress):
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost"

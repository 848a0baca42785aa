"""The admin listener: is the process alive, and is the mesh ready."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from dstack_mesh.model import Address, UnixAddress
from dstack_mesh.ops.readiness import Readiness
from dstack_mesh.relay.answers import Answer, json_answer
from dstack_mesh.relay.interfaces import Decision, Handler, Plan
from dstack_mesh.relay.lane import Route
from dstack_mesh.wire.request import RequestLine, parse_request_fields

_NOTHING: frozenset[bytes] = frozenset()
_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


class Admin(Handler[Plan]):
    """The handler of all connections of the admin listener."""

    def __init__(self, readiness: Readiness, metrics: Callable[[], str]) -> None:
        """`metrics` gives the Prometheus text."""
        self._readiness = readiness
        self._metrics = metrics

    def plan(self, line: RequestLine, block: bytes) -> Plan:
        """See `Handler`."""
        return Plan(parse_request_fields(block, line.minor, _NOTHING, line.authority))

    def route(self, line: RequestLine, plan: Plan, last: Route | None = None) -> Decision:
        """See `Handler`."""
        path = line.target.partition(b"?")[0]
        if line.method not in (b"GET", b"HEAD"):
            return Answer(405, b"GET and HEAD only\n", _TEXT, fields=b"Allow: GET, HEAD\r\n")
        if path == b"/livez":
            return Answer(200, b"OK\n", _TEXT)
        if path == b"/readyz":
            return self._ready(include_backend=False)
        if path == b"/readyz/inbound":
            return self._ready(include_backend=True)
        if path == b"/metrics":
            return Answer(200, self._metrics().encode(), _METRICS)
        return Answer(404, b"here are /livez, /readyz, /readyz/inbound and /metrics\n", _TEXT)

    async def _ready(self, *, include_backend: bool) -> Answer:
        ready, report = await self._readiness.report(include_backend)
        return json_answer(200 if ready else 503, report)


def is_loopback(address: Address) -> bool:
    """Tell whether only this machine can reach `address`."""
    if isinstance(address, UnixAddress):
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost"

"""What of a worker's parts is read when its report is made: connections, gauges, apps' counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dstack_mesh.dstack.gateway import GatewayDirectory
from dstack_mesh.identity.store import IdentityStore
from dstack_mesh.model import AppId
from dstack_mesh.ops.families import Family, Sample
from dstack_mesh.ops.journal import Journal
from dstack_mesh.ops.metrics import Metrics, Samples
from dstack_mesh.ops.readiness import ReadinessChecks
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.tally import PeerTallies
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.relay.worker import Worker

DIRECTIONS = ("outbound", "inbound", "agent")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a report is made of."""

    version: str
    metrics: Metrics
    journal: Journal
    identity: IdentityStore
    directory: GatewayDirectory
    worker: Worker
    services: Sequence[Service]
    """The listeners' for requests, not the admin listener's."""

    targets: PeerTallies
    callers: PeerTallies | None
    readiness: ReadinessChecks
    bound: Callable[[], Mapping[str, str | None]]
    settings: Callable[[], dict[str, str]]
    """Some of those in effect, by their key."""

    label_apps: frozenset[AppId] | None
    clock: Callable[[], float] = time.time


def read_gauges(parts: Parts) -> None:
    """Have the metrics of `parts` ask for what is not counted as it happens."""
    read = parts.metrics.read

    def renewals() -> Samples:
        yield {"result": "ok"}, parts.identity.fetched
        yield {"result": "failed"}, parts.identity.failed

    def expiry() -> Samples:
        if parts.identity.current is not None:
            yield {}, parts.identity.current.not_after

    def open_now() -> Samples:
        books = connections(parts)
        for direction in DIRECTIONS:
            if direction != "agent":
                yield {"direction": direction, "side": "downstream"}, books.downstream[direction]
            upstream = books.active[direction] + books.idle[direction]
            yield {"direction": direction, "side": "upstream"}, upstream

    def pool() -> Samples:
        books = connections(parts)
        yield {"state": "active"}, books.active.total()
        yield {"state": "idle"}, books.idle.total()

    read("identity_renewals_total", "counter", "Certificates fetched for ourselves.", renewals)
    read(
        "identity_expiry_timestamp_seconds",
        "gauge",
        "When our certificate expires, in seconds since 1970.",
        expiry,
        "min",
    )
    read("connections_open", "gauge", "Open connections.", open_now)
    read("pool_connections", "gauge", "Open connections to upstreams.", pool)


@dataclass(slots=True)
class Books:
    """Connections by direction."""

    downstream: Counter[str]
    active: Counter[str]
    idle: Counter[str]


def _direction(upstream: Upstream) -> str:
    lane = upstream.lane
    if lane.tally is not None:
        return lane.tally.direction
    return "outbound" if lane.peer is not None else "inbound"


def connections(parts: Parts) -> Books:
    """Count what is open now."""
    downstream = Counter(
        {service.direction: len(service.connections) for service in parts.services}
    )
    active: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    for upstream in parts.worker.upstreams:
        if isinstance(upstream, Upstream):
            (idle if upstream.exchange is None else active)[_direction(upstream)] += 1
    return Books(downstream, active, idle)


def by_app(parts: Parts) -> list[Family]:
    """Give the metrics that have app-ids as labels: the apps of `label_apps`, the rest as one."""
    requests: Counter[tuple[str, str]] = Counter()
    errors: Counter[tuple[str, str]] = Counter()
    for direction, tallies in (("outbound", parts.targets), ("inbound", parts.callers)):
        for tally in tallies.all() if tallies is not None else ():
            app_id = AppId(tally.name.partition(":")[0])
            key = direction, app_id if parts.label_apps and app_id in parts.label_apps else "other"
            requests[key] += tally.requests
            errors[key] += tally.errors
    return [
        Family(
            name, "counter", help_, [Sample("", _app_labels(key), n) for key, n in found.items()]
        )
        for name, help_, found in (
            ("peer_requests_total", "Requests to or from an app.", requests),
            ("peer_errors_total", "Those that ended in an error of the mesh's own.", errors),
        )
    ]


def _app_labels(key: tuple[str, str]) -> dict[str, str]:
    return dict(zip(("direction", "app"), key, strict=True))

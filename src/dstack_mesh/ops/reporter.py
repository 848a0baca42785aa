"""What one worker process tells of itself, collected when somebody asks."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable

from dstack_mesh.identity.store import IdentityStore
from dstack_mesh.ops import report
from dstack_mesh.ops.families import Family
from dstack_mesh.ops.journal import Journal
from dstack_mesh.ops.merge import most_asked
from dstack_mesh.ops.parts import DIRECTIONS, Books, Parts, by_app, connections, read_gauges
from dstack_mesh.policy.current import Current
from dstack_mesh.relay.tally import BUCKETS, PeerTally, Tally
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.settings.tree import Settings


class Reporter:
    """Makes the report of this process."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started_at = parts.clock()
        read_gauges(parts)

    async def collect(self, include_backend: bool = True) -> report.WorkerReport:
        """Collect everything; `include_backend`: see `ReadinessChecks`."""
        readiness = await self._parts.readiness.report(include_backend)
        return report.WorkerReport(os.getpid(), self._families(), self._status(readiness))

    def _families(self) -> list[Family]:
        parts = self._parts
        families = parts.metrics.dump()
        if parts.label_apps:
            families += by_app(parts)
        return families

    def _status(self, readiness: report.Readiness) -> report.Status:
        parts = self._parts
        return report.Status(
            version=parts.version,
            now=parts.clock(),
            started_at=self._started_at,
            workers=1,
            tasks=len(asyncio.all_tasks()),
            readiness=readiness,
            identity=_identity(parts.identity),
            gateway=report.Gateway(
                domain=parts.directory.text,
                is_configured=parts.directory.is_configured,
                problem=parts.directory.reason,
            ),
            listeners=dict(parts.bound()),
            settings=parts.settings(),
            bucket_bounds=list(BUCKETS),
            traffic=_traffic(parts),
            decisions=dict(parts.metrics.decisions),
            targets=most_asked(_targets(parts)),
            callers=most_asked(_callers(parts)),
            incidents=parts.journal.incidents(),
        )


def shown_settings(settings: Settings, current: Current, journal: Journal) -> dict[str, str]:
    """Give the settings that tell what a mesh does, for its status page."""
    inbound, policy = settings.inbound, current.policy
    return {
        "inbound.mode": "off" if inbound.backend is None else inbound.mode,
        "inbound.backend": str(inbound.backend or "none"),
        "inbound.allow": policy.allow.text,
        "inbound.policy_mode": "audit" if policy.audit else "enforce",
        "inbound.rules": "none" if policy.asks_who_only else "first match",
        "outbound.agent": settings.outbound.agent,
        "log.access": journal.access,
    }


def _identity(store: IdentityStore) -> report.Identity:
    snapshot = store.current
    if snapshot is None:
        return report.Identity(store.source, store.reason, store.fetched, store.failed)
    info = snapshot.app_info
    return report.Identity(
        source=store.source,
        problem=store.reason,
        fetched=store.fetched,
        failed=store.failed,
        app_id=snapshot.app_id,
        generation=snapshot.generation,
        loaded_at=store.loaded_at,
        renew_at=snapshot.renew_at,
        not_after=snapshot.not_after,
        instance_id=info.instance_id if info else "",
        compose_hash=info.compose_hash if info else "",
        os_image_hash=info.os_image_hash if info else "",
        device_id=info.device_id if info else "",
    )


def _traffic(parts: Parts) -> dict[str, report.Traffic]:
    books = connections(parts)
    tallies = {tally.direction: tally for tally in parts.metrics.tallies()}
    return {
        direction: _of_direction(tallies.get(direction) or Tally(direction), direction, books)
        for direction in DIRECTIONS
    }


def _of_direction(tally: Tally, direction: str, books: Books) -> report.Traffic:
    errors: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    for (_, status_class, code), count in tally.requests.items():
        classes[f"{status_class}xx" if status_class else "none"] += count
        if code:
            errors[code] += count
    return report.Traffic(
        requests=classes.total(),
        errors=dict(errors),
        classes=dict(classes),
        bytes_up=tally.bytes_up,
        bytes_down=tally.bytes_down,
        buckets=list(tally.buckets),
        seconds=tally.seconds,
        downstream=books.downstream[direction],
        upstream_active=books.active[direction],
        upstream_idle=books.idle[direction],
    )


def _targets(parts: Parts) -> Iterable[report.Peer]:
    active: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    for upstream in parts.worker.upstreams:
        if isinstance(upstream, Upstream) and upstream.lane.peer is not None:
            (idle if upstream.exchange is None else active)[upstream.lane.peer.name] += 1
    for tally in parts.targets.all():
        yield _peer(tally, active[tally.name], idle[tally.name])


def _callers(parts: Parts) -> Iterable[report.Peer]:
    if parts.callers is None:
        return
    open_: Counter[str] = Counter()
    for service in parts.services:
        for connection in service.connections:
            tally = getattr(connection.handler(), "tally", None)
            if isinstance(tally, PeerTally):
                open_[tally.name] += 1
    for tally in parts.callers.all():
        yield _peer(tally, open_[tally.name], 0)


def _peer(tally: PeerTally, active: int, idle: int) -> report.Peer:
    last = report.PeerError(*tally.last_error) if tally.last_error is not None else None
    return report.Peer(tally.name, tally.requests, tally.errors, active, idle, last)

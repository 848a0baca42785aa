"""Reports of several worker processes as if they were one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import msgspec

from dstack_mesh.ops.families import merge_families
from dstack_mesh.ops.report import (
    Check,
    Identity,
    Incident,
    Peer,
    Readiness,
    Status,
    Traffic,
    WorkerReport,
)

MOST_PEERS = 100
"""Peers of a direction that a status names: those with the most requests."""

MOST_INCIDENTS = 100


def merge_reports(reports: Sequence[WorkerReport]) -> WorkerReport:
    """Make one report of at least one. What is no number is the first worker's."""
    first = reports[0]
    if len(reports) == 1:
        return first
    return WorkerReport(
        pid=first.pid,
        metrics=merge_families([report.metrics for report in reports]),
        status=_merge_status([report.status for report in reports]),
    )


def _merge_status(all_: Sequence[Status]) -> Status:
    first = all_[0]
    return msgspec.structs.replace(
        first,
        now=max(one.now for one in all_),
        started_at=min(one.started_at for one in all_),
        workers=sum(one.workers for one in all_),
        tasks=sum(one.tasks for one in all_),
        readiness=merge_readiness([one.readiness for one in all_]),
        identity=_merge_identity([one.identity for one in all_]),
        gateway=next((one.gateway for one in all_ if one.gateway.problem), first.gateway),
        traffic=_merge_traffic([one.traffic for one in all_]),
        decisions=_sum(one.decisions for one in all_),
        targets=most_asked(merge_peers(one.targets for one in all_)),
        callers=most_asked(merge_peers(one.callers for one in all_)),
        incidents=newest(one.incidents for one in all_),
    )


def merge_readiness(all_: Sequence[Readiness]) -> Readiness:
    """Say what is missing anywhere: a request may come to any of them."""
    checks: dict[str, Check] = {}
    for one in all_:
        for name, check in one.checks.items():
            known = checks.get(name)
            if known is None or (known.ok and not check.ok):
                checks[name] = check
    return Readiness(all(one.ready for one in all_), checks)


def _merge_identity(all_: Sequence[Identity]) -> Identity:
    """Give the one that ends first: the worst off is what an operator has to know."""
    worst = min(all_, key=lambda one: one.not_after if one.not_after is not None else 0.0)
    return msgspec.structs.replace(
        worst,
        fetched=sum(one.fetched for one in all_),
        failed=sum(one.failed for one in all_),
        problem=next((one.problem for one in all_ if one.problem), None),
    )


def _merge_traffic(all_: Sequence[dict[str, Traffic]]) -> dict[str, Traffic]:
    directions = dict.fromkeys(chain.from_iterable(all_))
    return {
        direction: _add_traffic([one[direction] for one in all_ if direction in one])
        for direction in directions
    }


def _add_traffic(all_: Sequence[Traffic]) -> Traffic:
    return Traffic(
        requests=sum(one.requests for one in all_),
        errors=_sum(one.errors for one in all_),
        classes=_sum(one.classes for one in all_),
        bytes_up=sum(one.bytes_up for one in all_),
        bytes_down=sum(one.bytes_down for one in all_),
        buckets=[sum(counts) for counts in zip(*(one.buckets for one in all_), strict=True)],
        seconds=sum(one.seconds for one in all_),
        downstream=sum(one.downstream for one in all_),
        upstream_active=sum(one.upstream_active for one in all_),
        upstream_idle=sum(one.upstream_idle for one in all_),
    )


def _sum(all_: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in all_:
        total.update(one)
    return dict(total)


def merge_peers(all_: Iterable[Iterable[Peer]]) -> list[Peer]:
    """Add up what is told of each peer."""
    found: dict[str, Peer] = {}
    for peer in chain.from_iterable(all_):
        known = found.get(peer.name)
        found[peer.name] = peer if known is None else _add_peer(known, peer)
    return list(found.values())


def _add_peer(one: Peer, other: Peer) -> Peer:
    errors = [error for error in (one.last_error, other.last_error) if error is not None]
    return Peer(
        name=one.name,
        requests=one.requests + other.requests,
        errors=one.errors + other.errors,
        active=one.active + other.active,
        idle=one.idle + other.idle,
        last_error=max(errors, key=lambda error: error.at, default=None),
    )


def most_asked(peers: Iterable[Peer]) -> list[Peer]:
    """Give the peers with the most requests, the busiest first."""
    return sorted(peers, key=lambda peer: (-peer.requests, peer.name))[:MOST_PEERS]


def newest(all_: Iterable[Iterable[Incident]]) -> list[Incident]:
    """Give the newest incidents, the last one first."""
    found = sorted(chain.from_iterable(all_), key=lambda one: -one.at)
    return found[:MOST_INCIDENTS]

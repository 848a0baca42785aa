"""Reports as workers make them, for tests that merge or show them."""

from __future__ import annotations

from dstack_mesh.ops.families import Family, Sample
from dstack_mesh.ops.report import (
    Check,
    Gateway,
    Identity,
    Readiness,
    Status,
    Traffic,
    WorkerReport,
)


def traffic(requests: int = 0, **errors: int) -> Traffic:
    return Traffic(
        requests=requests,
        errors=errors,
        classes={"2xx": requests},
        bytes_up=10,
        bytes_down=20,
        buckets=[requests, 0, 1],
        seconds=0.5,
        downstream=1,
        upstream_active=2,
        upstream_idle=3,
    )


def status(**changes: object) -> Status:
    fields: dict[str, object] = {
        "version": "1",
        "now": 1000.0,
        "started_at": 900.0,
        "workers": 1,
        "tasks": 4,
        "readiness": Readiness(True, {"identity": Check(True, "app a")}),
        "identity": Identity("the guest agent", None, 1, 0, "aa" * 20, 1, 900.0, 950.0, 2000.0),
        "gateway": Gateway("apps.example", False, None),
        "listeners": {"outbound": "127.0.0.1:8091"},
        "settings": {"inbound.allow": "any"},
        "bucket_bounds": [0.1, 1.0],
        "traffic": {"outbound": traffic(4, tls_failed=1), "inbound": traffic(2)},
        "decisions": {"allow": 2},
        "targets": [],
        "callers": [],
        "incidents": [],
    }
    return Status(**{**fields, **changes})  # type: ignore[arg-type]


def worker_report(pid: int = 1, **changes: object) -> WorkerReport:
    metrics = [Family("requests_total", "counter", "Requests.", [Sample("", {}, 5)])]
    return WorkerReport(pid, metrics, status(**changes))

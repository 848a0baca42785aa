from __future__ import annotations

import json

import msgspec
from tests.ops.reports import worker_report

from dstack_mesh.ops.report import Incident, Peer, PeerError, WorkerReport


def test_a_report_crosses_a_socket_whole() -> None:
    report = worker_report(
        targets=[Peer("a", 1, 1, 0, 1, PeerError(5.0, "tls_failed", "why"))],
        incidents=[Incident(at=1.0, direction="outbound", code="tls_failed", path="/x")],
    )
    for codec in (msgspec.msgpack, msgspec.json):
        assert codec.decode(codec.encode(report), type=WorkerReport) == report


def test_an_incident_leaves_out_what_is_not_known() -> None:
    shown = json.loads(msgspec.json.encode(Incident(at=1.0, direction="inbound", code="c")))
    assert shown == {"at": 1.0, "direction": "inbound", "code": "c"}

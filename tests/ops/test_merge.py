from __future__ import annotations

from tests.ops.reports import status, traffic, worker_report

from dstack_mesh.ops.families import Sample
from dstack_mesh.ops.merge import MOST_INCIDENTS, MOST_PEERS, merge_reports
from dstack_mesh.ops.report import (
    Check,
    Gateway,
    Identity,
    Incident,
    Peer,
    PeerError,
    Readiness,
    Status,
    WorkerReport,
)


def merged(*all_: Status) -> Status:
    return merge_reports([WorkerReport(pid, [], one) for pid, one in enumerate(all_)]).status


def test_one_report_is_itself() -> None:
    report = worker_report()
    assert merge_reports([report]) is report


def test_numbers_add_up() -> None:
    found = merge_reports([worker_report(1), worker_report(2), worker_report(3)])
    assert found.pid == 1
    assert found.metrics[0].samples == [Sample("", {}, 15)]
    assert (found.status.workers, found.status.tasks) == (3, 12)
    assert found.status.decisions == {"allow": 6}
    outbound = found.status.traffic["outbound"]
    assert (outbound.requests, outbound.errors) == (12, {"tls_failed": 3})
    assert outbound.classes == {"2xx": 12}
    assert outbound.buckets == [12, 0, 3]
    assert (outbound.bytes_up, outbound.bytes_down, outbound.seconds) == (30, 60, 1.5)
    open_now = (outbound.downstream, outbound.upstream_active, outbound.upstream_idle)
    assert open_now == (3, 6, 9)


def test_a_direction_that_one_worker_lacks() -> None:
    found = merged(status(traffic={"inbound": traffic(1)}), status(traffic={"agent": traffic(2)}))
    assert {way: one.requests for way, one in found.traffic.items()} == {"inbound": 1, "agent": 2}


def test_what_is_missing_in_one_worker_is_missing() -> None:
    fine = status(readiness=Readiness(True, {"identity": Check(True, "fine")}))
    ill = Readiness(False, {"identity": Check(False, "none"), "draining": Check(False, "stops")})
    for order in ([fine, status(readiness=ill)], [status(readiness=ill), fine]):
        found = merged(*order).readiness
        assert not found.ready
        assert found.checks == {
            "identity": Check(False, "none"),
            "draining": Check(False, "stops"),
        }
    assert merged(fine, fine).readiness == fine.readiness


def identity(not_after: float | None, problem: str | None = None) -> Identity:
    return Identity("the guest agent", problem, 1, 2, "aa" * 20, 1, 900.0, 950.0, not_after)


def test_the_identity_that_ends_first_is_shown() -> None:
    found = merged(
        status(identity=identity(3000.0)),
        status(identity=identity(2000.0)),
        status(identity=identity(4000.0, "no agent")),
    ).identity
    assert (found.not_after, found.problem) == (2000.0, "no agent")
    assert (found.fetched, found.failed) == (3, 6)
    assert merged(status(), status(identity=identity(None))).identity.not_after is None


def test_a_gateway_with_a_problem_is_shown() -> None:
    problem = Gateway(None, False, "no file")
    assert merged(status(), status(gateway=problem)).gateway == problem
    assert merged(status(), status()).gateway == status().gateway


def test_times_span_all_workers() -> None:
    found = merged(status(now=1000.0, started_at=500.0), status(now=1001.0, started_at=400.0))
    assert (found.now, found.started_at) == (1001.0, 400.0)


def test_peers_are_added_up_and_the_busiest_come_first() -> None:
    early, late = PeerError(1.0, "tls_failed", "x"), PeerError(2.0, "connect_failed", "y")
    found = merged(
        status(targets=[Peer("a", 1, 1, 1, 2, early), Peer("b", 5, 0, 0, 1, None)]),
        status(targets=[Peer("a", 9, 1, 3, 4, late), Peer("c", 7, 0, 0, 0, None)]),
    )
    assert found.targets == [
        Peer("a", 10, 2, 4, 6, late),
        Peer("c", 7, 0, 0, 0, None),
        Peer("b", 5, 0, 0, 1, None),
    ]
    assert found.callers == []


def test_what_is_shown_is_bounded() -> None:
    peers = [Peer(f"{number:040x}", number, 0, 0, 0, None) for number in range(300)]
    incidents = [Incident(at=float(number), direction="inbound", code="c") for number in range(300)]
    found = merged(status(callers=peers[:150]), status(callers=peers[150:], incidents=incidents))
    assert len(found.callers) == MOST_PEERS
    assert found.callers[0].requests == 299
    assert len(found.incidents) == MOST_INCIDENTS
    assert found.incidents[0].at == 299.0, "the newest first"

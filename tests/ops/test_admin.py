from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine

import pytest
from tests.ops.reports import worker_report

from dstack_mesh.errors import BadRequest
from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.ops.admin import Admin, is_loopback
from dstack_mesh.ops.report import Check, Readiness, WorkerReport
from dstack_mesh.relay.answers import Answer
from dstack_mesh.wire.request_line import parse_request_line

LOOPBACK = TcpAddress("127.0.0.1", 8093)


class Worker:
    """Stands for the worker processes; says what the test puts there."""

    def __init__(self) -> None:
        self.reports = [worker_report()]
        self.asked: list[bool] = []

    async def collect(self, include_backend: bool) -> list[WorkerReport]:
        self.asked.append(include_backend)
        return self.reports

    def admin(self, address: Address = LOOPBACK) -> Admin:
        return Admin(self.collect, address)


@pytest.fixture
def worker() -> Worker:
    return Worker()


async def ask(
    admin: Admin, path: str, method: str = "GET", fields: str = "Host: localhost\r\n"
) -> Answer:
    line = parse_request_line(f"{method} {path} HTTP/1.1".encode())
    answer = admin.route(line, admin.plan(line, fields.encode()))
    if isinstance(answer, Coroutine):
        answer = await answer
    assert isinstance(answer, Answer)
    return answer


NOT_READY = Readiness(False, {"gateway": Check(False, "no file")})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_livez_asks_nobody(worker: Worker, method: str) -> None:
    assert (await ask(worker.admin(), "/livez", method, "Host: any.example\r\n")).status == 200
    assert worker.asked == []


async def test_readyz_says_what_is_there(worker: Worker) -> None:
    answer = await ask(worker.admin(), "/readyz")
    assert answer.status == 200
    assert b"Content-Type: application/json\r\n" in answer.fields
    assert b"Cache-Control: no-store\r\n" in answer.fields
    assert json.loads(answer.body) == {
        "ready": True,
        "checks": {"identity": {"ok": True, "reason": "app a"}},
    }


@pytest.mark.parametrize("path", ["/readyz", "/readyz/inbound", "/readyz?verbose"])
async def test_readyz_says_what_is_missing_in_any_worker(worker: Worker, path: str) -> None:
    worker.reports.append(worker_report(2, readiness=NOT_READY))
    answer = await ask(worker.admin(), path)
    assert answer.status == 503
    report = json.loads(answer.body)
    assert not report["ready"]
    assert [name for name, check in report["checks"].items() if not check["ok"]] == ["gateway"]


async def test_the_backend_is_asked_only_where_it_counts(worker: Worker) -> None:
    admin = worker.admin()
    for path in ("/readyz", "/metrics"):
        await ask(admin, path)
    assert worker.asked == [False, False], "it may be waiting for the mesh"
    for path in ("/readyz/inbound", "/status"):
        await ask(admin, path)
    assert worker.asked == [False, False, True, True]


async def test_metrics_of_all_workers(worker: Worker) -> None:
    worker.reports.append(worker_report(2))
    answer = await ask(worker.admin(), "/metrics")
    assert answer.status == 200
    assert b"dstack_mesh_requests_total 10\n" in answer.body
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in answer.fields


async def test_status_and_the_page(worker: Worker) -> None:
    shown = await ask(worker.admin(), "/status")
    assert json.loads(shown.body)["identity"]["app_id"] == "aa" * 20
    assert b"Cache-Control: no-store\r\n" in shown.fields
    assert (await ask(worker.admin(), "/")).body.startswith(b"<!doctype html>")


@pytest.mark.parametrize("path", ["/status", "/", "/nothing"])
async def test_others_than_this_machine_get_no_more_than_health_and_metrics(
    worker: Worker, path: str
) -> None:
    admin = worker.admin(TcpAddress("0.0.0.0", 8093))
    answer = await ask(admin, path)
    assert answer.status == 404
    assert answer.body == b"here are /livez, /readyz, /readyz/inbound, /metrics\n"
    for open_path in ("/livez", "/readyz", "/readyz/inbound", "/metrics"):
        assert (await ask(admin, open_path, fields="Host: mesh.example\r\n")).status == 200


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8093", "127.0.0.1:8093", "[::1]:8093", "10.0.0.5", "a.localhost:1"],
)
async def test_a_host_that_is_no_strangers_name(worker: Worker, host: str) -> None:
    for path in ("/status", "/"):
        assert (await ask(worker.admin(), path, fields=f"Host: {host}\r\n")).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8093", "localhost.evil.example", "127.0.0.1.evil.example", ""],
)
async def test_a_web_site_cannot_read_the_page_by_its_own_name(worker: Worker, host: str) -> None:
    """DNS rebinding: the site's name leads to 127.0.0.1, and the browser sends that name."""
    for path in ("/status", "/"):
        answer = await ask(worker.admin(), path, fields=f"Host: {host}\r\n")
        assert answer.status == 421
        assert b"aa" * 20 not in answer.body
    assert worker.asked == []


async def test_no_browser_reaches_a_unix_socket(worker: Worker) -> None:
    admin = worker.admin(UnixAddress("/run/admin.sock"))
    assert (await ask(admin, "/status", fields="Host: any\r\n")).status == 200


@pytest.mark.parametrize("path", ["/readyz/", "/livez/x", "/LIVEZ", "/%6civez", "/nothing"])
async def test_other_paths_are_not_found(worker: Worker, path: str) -> None:
    answer = await ask(worker.admin(), path)
    assert answer.status == 404
    assert b"/livez" in answer.body, "it says what is there"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
async def test_nothing_can_be_changed(worker: Worker, method: str, path: str) -> None:
    answer = await ask(worker.admin(), path, method)
    assert answer.status == 405
    assert b"Allow: GET, HEAD\r\n" in answer.fields


async def test_a_request_is_held_to_http(worker: Worker) -> None:
    with pytest.raises(BadRequest):
        await ask(worker.admin(), "/livez", fields="Host: x\r\nHost: y\r\n")


async def test_connections_persist(worker: Worker) -> None:
    admin = worker.admin()
    admin.connected(asyncio.Transport())
    assert admin.may_persist()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (TcpAddress("127.0.0.1", 1), True),
        (TcpAddress("127.9.9.9", 1), True),
        (TcpAddress("::1", 1), True),
        (TcpAddress("localhost", 1), True),
        (UnixAddress("/run/admin.sock"), True),
        (TcpAddress("0.0.0.0", 1), False),
        (TcpAddress("::", 1), False),
        (TcpAddress("10.0.0.1", 1), False),
        (TcpAddress("admin.example", 1), False),
        (TcpAddress("localhost.example", 1), False),
        (TcpAddress("", 1), False),
    ],
)
def test_what_only_this_machine_reaches(address: Address, expected: bool) -> None:
    assert is_loopback(address) is expected

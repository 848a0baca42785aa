from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import pytest

from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.ops.readiness import Check, Readiness, backend_answers, backends_answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


def says(ok: bool, reason: str) -> Check:
    return lambda: (ok, reason)


async def answers() -> tuple[bool, str]:
    return True, "backend:8080 answers"


async def refuses() -> tuple[bool, str]:
    return False, "backend:8080 does not answer"


VALID = says(True, "valid")
KNOWN = says(True, "apps.example.org")


def readiness(
    *,
    identity: Check = VALID,
    gateway: Check | None = KNOWN,
    backend: Callable[[], Awaitable[tuple[bool, str]]] | None = answers,
    draining: Callable[[], bool] = lambda: False,
) -> Readiness:
    return Readiness(identity=identity, gateway=gateway, backend=backend, draining=draining)


async def test_ready_and_its_json() -> None:
    assert await readiness().report(False) == (
        True,
        {
            "ready": True,
            "checks": {
                "identity": {"ok": True, "reason": "valid"},
                "gateway": {"ok": True, "reason": "apps.example.org"},
            },
        },
    )


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"identity": says(False, "no agent")}, {"identity": "no agent"}),
        ({"gateway": says(False, "no file")}, {"gateway": "no file"}),
        ({"draining": lambda: True}, {"draining": "the mesh is stopping"}),
        (
            {"identity": says(False, "a"), "gateway": says(False, "b")},
            {"identity": "a", "gateway": "b"},
        ),
    ],
)
@pytest.mark.parametrize("include_backend", [False, True])
async def test_what_is_missing_is_named(
    missing: dict[str, Check], reason: dict[str, str], include_backend: bool
) -> None:
    ready, report = await readiness(**missing).report(include_backend)  # type: ignore[arg-type]
    assert (ready, report["ready"]) == (False, False)
    failed = {name: check["reason"] for name, check in report["checks"].items() if not check["ok"]}
    assert failed == reason


async def test_the_backend_counts_only_where_it_is_asked_for() -> None:
    checks = readiness(backend=refuses)
    ready, report = await checks.report(False)
    assert ready
    assert "backend" not in report["checks"]
    ready, report = await checks.report(True)
    assert not ready
    assert report["checks"]["backend"] == {"ok": False, "reason": "backend:8080 does not answer"}
    ready, report = await readiness().report(True)
    assert ready
    assert report["checks"]["backend"] == {"ok": True, "reason": "backend:8080 answers"}


async def test_what_is_off_is_not_missed() -> None:
    ready, report = await readiness(gateway=None, backend=None).report(True)
    assert ready
    assert report["checks"]["gateway"] == {"ok": True, "reason": "outbound is off"}
    assert report["checks"]["backend"] == {"ok": True, "reason": "inbound is off"}


async def test_the_checks_are_asked_anew() -> None:
    state = {"ok": False}
    checks = readiness(identity=lambda: (state["ok"], "now"))
    assert not (await checks.report(False))[0]
    state["ok"] = True
    assert (await checks.report(False))[0]


# The backend's port


async def test_a_tcp_backend_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = TcpAddress("127.0.0.1", listener.getsockname()[1])
        assert await backend_answers(address) == (True, f"{address} answers")
        listener.settimeout(5)
        await asyncio.to_thread(_is_closed, listener)


async def test_a_unix_backend_answers(tmp_path: Path) -> None:
    path = str(tmp_path / "b.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        assert await backend_answers(UnixAddress(path)) == (True, f"unix:{path} answers")
        listener.settimeout(5)
        await asyncio.to_thread(_is_closed, listener)


def _is_closed(listener: socket.socket) -> None:
    """The check must not leave its connection open at the backend."""
    accepted, _ = listener.accept()
    with accepted:
        accepted.settimeout(5)
        assert accepted.recv(1) == b""


async def test_a_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = TcpAddress("127.0.0.1", port)
    assert await backend_answers(address) == (
        False,
        f"{address} does not answer: connection refused",
    )


async def test_a_missing_socket(tmp_path: Path) -> None:
    ok, reason = await backend_answers(UnixAddress(str(tmp_path / "none.sock")))
    assert not ok
    assert reason.endswith("none.sock does not answer: No such file or directory")


@pytest.mark.parametrize(
    "address", [TcpAddress("a" * 70, 80), UnixAddress("a\0b"), UnixAddress("/" + "a" * 200)]
)
async def test_an_address_that_can_not_be(address: Address) -> None:
    ok, reason = await backend_answers(address)
    assert not ok
    assert "does not answer: " in reason


async def test_a_backend_that_takes_no_connection_is_over_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as held:
        port = full.getsockname()[1]
        # A full backlog: the kernel leaves further connections waiting.
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        ok, reason = await backend_answers(TcpAddress("127.0.0.1", port), timeout=0.05)
        assert not ok
        assert reason == f"127.0.0.1:{port} does not answer within 0.05 s"


async def test_several_backends_must_all_answer() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        there = TcpAddress(*server.sockets[0].getsockname()[:2])
        gone = UnixAddress("/nowhere/backend.sock")
        assert await backends_answer([there]) == (True, f"{there} answers")
        ok, reason = await backends_answer([there, gone, there])
        assert not ok
        assert reason.startswith(f"{there} answers; {gone} does not answer: ")
        assert reason.count(str(there)) == 1

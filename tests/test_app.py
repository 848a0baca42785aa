from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dstack_mesh import listen
from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Request, Response
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    eventually,
    mesh,
    problem,
    request,
    tcp,
)
from tests.integration.processes import COMMAND, clean_environ, sidecar_process
from tests.integration.tls_peers import call_inbound, caller_context

FREE = "127.0.0.1:0"


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with mesh(tmp_path) as found:
        yield found


async def _admin(one: Mesh, name: str, path: str) -> Answer:
    async with Client.connect(one.admin(name)) as client:
        await client.send(request("GET", path))
        return await client.answer()


async def _checks(one: Mesh, name: str, path: str, status: int) -> dict[str, dict[str, object]]:
    """Ask for a report of this status; give its checks."""
    answer = await _admin(one, name, path)
    assert answer.status == status, answer.body
    report = json.loads(answer.body)
    assert report["ready"] is (status == 200)
    checks: dict[str, dict[str, object]] = report["checks"]
    assert all(check["reason"] for check in checks.values())
    return checks


@contextlib.asynccontextmanager
async def _unix(path: Path) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


# The start, with and without an agent.


async def test_outbound_and_admin_open_without_an_agent_and_inbound_follows(one: Mesh) -> None:
    agent, backend = one.app("b").agent, Backend("b")
    one.backends["b"] = backend
    await one.start("a")
    await agent.aclose()
    sidecar = await one.start_closed("b", MESH_BACKEND=str(await backend.start()))
    opening = asyncio.ensure_future(sidecar.wait_open())

    answer = await one.call("b", "a")
    detail = problem(answer, "identity_unavailable", 503)["detail"]
    socket_path = str(one.app("b").directory / "dstack.sock")
    await eventually(lambda: sidecar.identity.failed > 0)
    detail = problem(await one.call("b", "a"), "identity_unavailable", 503)["detail"]
    assert socket_path in str(detail)
    problem(await one.call("b", None, path="/info"), "agent_unavailable", 502)
    assert (await _admin(one, "b", "/livez")).status == 200
    await eventually(lambda: sidecar.directory.current is not None)
    checks = await _checks(one, "b", "/readyz", 503)
    assert {name: check["ok"] for name, check in checks.items()} == {
        "identity": False,
        "gateway": True,
    }
    assert socket_path in str(checks["identity"]["reason"])
    kms = one.world.kms
    context = caller_context(kms.root_pem, kms.issue(one.app_id("a")))
    early = asyncio.ensure_future(call_inbound(one.inbound("b"), context))
    checks = await _checks(one, "b", "/readyz/inbound", 503)
    assert checks["backend"]["ok"] is True
    assert not opening.done()
    assert not early.done()

    await agent.start(UnixAddress(socket_path))
    async with asyncio.timeout(10):
        await opening
        assert (await early).status == 200
    await _checks(one, "b", "/readyz", 200)
    assert (await one.call("b", "a")).status == 200
    assert (await one.call("a", "b")).status == 200


async def test_a_mesh_that_waits_for_its_agent_can_be_ended(one: Mesh) -> None:
    await one.app("a").agent.aclose()
    sidecar = await one.start_closed("a", MESH_BACKEND="127.0.0.1:1")
    opening = asyncio.ensure_future(sidecar.wait_open())
    await eventually(lambda: sidecar.identity.failed > 0)
    async with asyncio.timeout(5):
        opening.cancel()
        await sidecar.drain()
        await sidecar.stop()


# What is bound.


async def test_bound_names_every_listener(one: Mesh) -> None:
    sidecar = await one.start("a", MESH_INBOUND_LISTEN=FREE)
    bound = sidecar.bound()
    assert list(bound) == ["outbound", "inbound", "auth", "admin"]
    assert bound["auth"] is None
    ports = {tcp(bound[name]).port for name in ("outbound", "inbound", "admin")}
    assert len(ports) == 3
    assert 0 not in ports


async def test_without_a_backend_inbound_is_off(one: Mesh) -> None:
    sidecar = await one.start("a", backend=False)
    assert sidecar.bound()["inbound"] is None
    checks = await _checks(one, "a", "/readyz/inbound", 200)
    assert checks["backend"] == {"ok": True, "reason": "inbound is off"}


async def test_listeners_can_be_off(one: Mesh) -> None:
    off = {"MESH_OUTBOUND_LISTEN": "off", "MESH_INBOUND_MODE": "off"}
    sidecar = await one.start("a", **off)
    bound = sidecar.bound()
    assert (bound["outbound"], bound["inbound"]) == (None, None)
    assert (await _checks(one, "a", "/readyz", 200))["gateway"]["reason"] == "outbound is off"
    sidecar = await one.start("b", MESH_ADMIN_LISTEN="off")
    assert sidecar.bound()["admin"] is None
    assert (await one.call("b", None, path="/health")).status == 200


async def test_every_listener_takes_a_unix_socket(one: Mesh, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.sock" for name in ("outbound", "inbound", "admin")}
    env = {f"MESH_{name.upper()}_LISTEN": f"unix:{path}" for name, path in paths.items()}
    await one.start("a")
    sidecar = await one.start("b", **env)
    assert sidecar.bound() == {
        **{name: f"unix:{path}" for name, path in paths.items()},
        "auth": None,
    }
    async with _unix(paths["admin"]) as client:
        await client.send(request("GET", "/readyz"))
        assert (await client.answer()).status == 200
    async with _unix(paths["outbound"]) as client:
        await client.send(request("GET", "/", [("x-dstack-target-app", one.app_id("a"))]))
        assert (await client.answer()).body == b"hello\n"
    kms = one.world.kms
    context = caller_context(kms.root_pem, kms.issue(one.app_id("a")))
    reader, writer = await asyncio.open_unix_connection(
        str(paths["inbound"]), ssl=context, server_hostname="b"
    )
    client = Client(reader, writer)
    await client.send(request("GET", "/echo"))
    seen = json.loads((await client.answer()).body)["headers"]
    assert ["x-dstack-app-id", one.app_id("a")] in seen
    writer.close()
    await writer.wait_closed()

    await sidecar.stop()
    assert [path for path in paths.values() if path.exists()] == []


async def test_a_socket_that_answers_is_not_taken_over(one: Mesh, tmp_path: Path) -> None:
    path = f"unix:{tmp_path / 'outbound.sock'}"
    await one.start("a", MESH_OUTBOUND_LISTEN=path)
    with pytest.raises(listen.ListenError, match="another process listens there"):
        await one.start_closed("b", MESH_OUTBOUND_LISTEN=path)
    await one.sidecars["b"].stop()
    async with _unix(tmp_path / "outbound.sock") as client:
        await client.send(request("GET", "/health"))
        assert (await client.answer()).status == 200


async def test_a_start_that_fails_gives_back_what_it_had_taken(one: Mesh) -> None:
    """Outbound is bound first, and inbound's address is taken."""
    with listen.bind(TcpAddress("127.0.0.1", 0)) as taken:
        env = {
            "MESH_BACKEND": "127.0.0.1:1",
            "MESH_INBOUND_LISTEN": str(listen.bound_address(taken)),
        }
        with pytest.raises(listen.ListenError, match=env["MESH_INBOUND_LISTEN"]):
            await one.start_closed("a", **env)
        await one.sidecars["a"].stop()
    sidecar = await one.start_closed("a", **env)
    await sidecar.wait_open()
    assert sidecar.bound()["outbound"] == one.app("a").env["MESH_OUTBOUND_LISTEN"]


# Readiness of the backend.


async def test_readyz_inbound_follows_the_backend_and_readyz_does_not(one: Mesh) -> None:
    await one.start("b")
    backend = one.backends["b"]
    address = one.sidecars["b"].settings.inbound.backend
    assert address is not None
    checks = await _checks(one, "b", "/readyz/inbound", 200)
    assert checks["backend"] == {"ok": True, "reason": f"{address} answers"}
    await backend.aclose()
    checks = await _checks(one, "b", "/readyz/inbound", 503)
    assert checks["backend"]["ok"] is False
    assert str(address) in str(checks["backend"]["reason"])
    assert "backend" not in await _checks(one, "b", "/readyz", 200)
    await backend.start(address)
    await _checks(one, "b", "/readyz/inbound", 200)


# The end.


async def test_nothing_is_left_after_stop(one: Mesh, tmp_path: Path) -> None:
    """Of a mesh in the middle of its work; the first round opens what a process opens once."""
    backends = [Backend("a"), Backend("b")]
    one.backends.update(zip("ab", backends, strict=True))
    addresses = [str(await backend.start()) for backend in backends]
    release = asyncio.Event()

    async def wait(_: Request) -> Response:
        await release.wait()
        return Response(200)

    backends[1].on("/wait", wait)

    async def work() -> None:
        release.clear()
        backends[1].requests.clear()
        for name, address in zip("ab", addresses, strict=True):
            sidecar = await one.start_closed(name, MESH_BACKEND=address)
            await sidecar.wait_open()
        await eventually(lambda: one.sidecars["a"].directory.current is not None)
        assert (await one.call("a", "b")).status == 200
        async with (
            Client.connect(one.outbound("a")) as idle,
            Client.connect(one.outbound("a")) as busy,
            Client.connect(one.admin("a")) as admin,
        ):
            await idle.send(request("GET", "/health"))
            await idle.answer()
            await admin.send(request("GET", "/livez"))
            await admin.answer()
            target = [("x-dstack-target-app", one.app_id("b"))]
            await busy.send(request("GET", "/wait", target))
            await eventually(lambda: len(backends[1].requests) == 2)
            # On connections of its own, which are then kept idle on either side.
            assert (await one.call("a", "b")).status == 200
            for name in "ab":
                await one.sidecars[name].stop()
            async with asyncio.timeout(5):
                for client in (idle, busy, admin):
                    assert await client.closed() == b""
        release.set()

    def open_now() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())

    await work()
    # The simulator notices closed connections by and by.
    counts = [open_now()]

    def settled() -> bool:
        counts.append(open_now())
        return len(counts) > 50 and len(set(counts[-50:])) == 1

    await eventually(settled)
    before = counts[-1]
    await work()
    await eventually(lambda: open_now() == before)


async def test_stopping_twice_is_harmless(one: Mesh) -> None:
    sidecar = await one.start("a")
    await sidecar.drain()
    await sidecar.stop()
    await sidecar.stop()


# As a process.


def _run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "run", *arguments],
        env={**clean_environ(), **env},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def _alone(tmp_path: Path) -> dict[str, str]:
    """Give settings of a mesh whose agent is absent."""
    return {
        "DSTACK_AGENT_ADDRESS": f"unix:{tmp_path}/absent.sock",
        "MESH_SYS_CONFIG": f"{tmp_path}/absent.json",
        "MESH_OUTBOUND_LISTEN": FREE,
        "MESH_ADMIN_LISTEN": FREE,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MESH_BACKEND", "nowhere"),
        ("MESH_OUTBOUND_LISTEN", "127.0.0.1:99999"),
        ("MESH_DRAIN_TIMEOUT", "soon"),
        ("MESH_ALLOWED_APPS", "everybody"),
    ],
)
def test_wrong_settings_end_the_start_with_one_line(tmp_path: Path, name: str, value: str) -> None:
    ended = _run({**_alone(tmp_path), name: value})
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("dstack-mesh: ")
    assert name in line
    assert value in line


@pytest.mark.parametrize("name", ["MESH_OUTBOUND_LISTEN", "MESH_ADMIN_LISTEN"])
def test_an_address_in_use_ends_the_start_with_one_line(tmp_path: Path, name: str) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text("of the mesh that runs there")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = _run({**_alone(tmp_path), name: address}, "--ready-file", str(ready))
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"dstack-mesh: cannot listen on {address}: another process listens")
    assert ready.read_text() == "of the mesh that runs there"


@contextlib.contextmanager
def _started(env: dict[str, str], log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a sidecar that may never be ready; its log goes to the file."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "run", *arguments], env={**clean_environ(), **env}, stderr=output
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _until(log: Path, event: str, **fields: object) -> None:
    """Wait for an event with these fields."""
    end = time.monotonic() + 20
    while True:
        complete = log.read_text().rpartition("\n")[0].splitlines()
        if any({"event": event, **fields}.items() <= json.loads(line).items() for line in complete):
            return
        assert time.monotonic() < end, complete
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_an_absent_agent_keeps_nobody_from_ending(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    log, ready = tmp_path / "log.jsonl", tmp_path / "ready.json"
    ready.write_text("left by a mesh that was killed")
    env = {**_alone(tmp_path), "MESH_BACKEND": "127.0.0.1:1", "MESH_INBOUND_LISTEN": FREE}
    with _started(env, log, "--ready-file", str(ready)) as process:
        _until(log, "listening", listener="admin")
        _until(log, "identity_fetch_failed")
        assert not ready.exists()
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == status
    _until(log, "stopped")
    assert "Traceback" not in log.read_text()


async def test_the_ready_file_tells_what_is_bound(one: Mesh) -> None:
    app = one.app("a")
    backend = one.backends["a"] = Backend("a")
    env = {**app.env, "MESH_BACKEND": str(await backend.start()), "MESH_OUTBOUND_LISTEN": FREE}
    ready = app.directory / "ready.json"
    async with sidecar_process(app.directory, env) as running:
        found = json.loads(ready.read_text())
        assert list(found) == ["outbound", "inbound", "auth", "admin", "pid"]
        assert found["pid"] == running.process.pid
        assert found["auth"] is None
        assert found["inbound"] == app.env["MESH_INBOUND_LISTEN"]
        assert found["admin"] == app.env["MESH_ADMIN_LISTEN"]
        listening = {
            str(line["listener"]): line["address"]
            for line in running.log
            if line["event"] == "listening"
        }
        assert listening == {name: found[name] for name in ("outbound", "inbound", "admin")}
        assert [path.name for path in app.directory.glob("*ready*")] == ["ready.json"]
        async with Client.connect(running.address("outbound")) as client:
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200


async def test_a_ready_file_that_cannot_be_written_ends_the_process(
    one: Mesh, tmp_path: Path
) -> None:
    log, ready = tmp_path / "log.jsonl", tmp_path / "absent" / "ready.json"
    with _started(one.app("a").env, log, "--ready-file", str(ready)) as process:
        await asyncio.to_thread(_until, log, "ready_file_failed", path=str(ready), level="error")
        assert await asyncio.to_thread(process.wait, 10) == 1
        assert "Traceback" not in log.read_text()


async def test_its_status_is_one_line_for_people(one: Mesh) -> None:
    one.app("a").agent.failing = True
    closed = await one.start_closed("a", MESH_OUTBOUND_LISTEN=FREE, MESH_ADMIN_LISTEN=FREE)
    assert closed.status().startswith("not ready: this mesh has no certificate yet: ")
    side = await one.start("b")
    assert side.status() == f"ready: app {one.app_id('b')}"
    async with Client.connect(one.outbound("b")):
        await eventually(lambda: len(side._outbound.connections) == 1)
        draining = asyncio.create_task(side.drain())
        await asyncio.sleep(0)
        assert side.status() == "stopping: 0 inbound and 1 outbound connections left"
        await draining


async def test_without_outbound_no_gateway_is_missed_in_the_status(one: Mesh) -> None:
    side = await one.start_closed(
        "a", MESH_OUTBOUND_LISTEN="off", MESH_SYS_CONFIG="/nowhere", MESH_ADMIN_LISTEN=FREE
    )
    await side.identity.wait_loaded()
    assert side.status() == f"ready: app {one.app_id('a')}"

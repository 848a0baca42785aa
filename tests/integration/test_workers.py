"""`MESH_WORKERS`: several processes that are one sidecar to everybody (interface.md, Lifecycle)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstack_mesh.model import TcpAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.messages import Request, Response
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    eventually,
    mesh,
    nobody_listens,
    problem,
    request,
)
from tests.integration.load import Counted, Load
from tests.integration.processes import (
    COMMAND,
    SidecarProcess,
    children,
    clean_environ,
    is_there,
    sidecar_process,
)
from tests.integration.test_identity_sources import Files
from tests.integration.tls_peers import caller_context

_PROMPT = 8.0
"""Seconds for what has to happen at once: far under the 30 s of the time limits here."""


@dataclass
class Site:
    """`b` has several workers; `a` is there to call it and to be called by it."""

    mesh: Mesh
    target: SidecarProcess
    backend: Backend
    """The one of `b`; `/wait` is answered, on either app, when `release` is set."""

    release: asyncio.Event
    config: Path
    ready_file: Path

    @property
    def inbound(self) -> TcpAddress:
        return self.target.address("inbound")

    @property
    def outbound(self) -> TcpAddress:
        return self.target.address("outbound")

    @property
    def supervisor(self) -> int:
        return self.target.process.pid

    def workers(self) -> list[int]:
        """Give the process ids of the workers that are there."""
        return children(self.supervisor)

    def context(self) -> ssl.SSLContext:
        kms = self.mesh.world.kms
        return caller_context(kms.root_pem, kms.issue(self.mesh.app_id("a")))

    def caller(self) -> contextlib.AbstractAsyncContextManager[Client]:
        """Connect to the inbound listener as app `a`."""
        return Client.connect(self.inbound, self.context())

    def to_a(self, path: str = "/") -> bytes:
        """Write a request for `b`'s outbound listener."""
        return request("GET", path, [("x-dstack-target-app", self.mesh.app_id("a"))])

    async def ask(self, path: str) -> Answer:
        """Ask the admin listener, on a connection of its own."""
        async with Client.connect(self.target.address("admin")) as client:
            await client.send(request("GET", path, [("Host", "localhost")]))
            return await client.answer()

    async def ready(self, is_ready: bool = True) -> dict[str, dict[str, object]]:
        """Wait until `/readyz` says so; give its checks."""
        end = time.monotonic() + _PROMPT
        while True:
            assert time.monotonic() < end
            with contextlib.suppress(ConnectionError):  # the worker that had taken it is at its end
                answer = await self.ask("/readyz")
                if (answer.status == 200) is is_ready:
                    break
        checks: dict[str, dict[str, object]] = json.loads(answer.body)["checks"]
        return checks

    async def counted(self, direction: str) -> int:
        """Give the requests of a direction by `/metrics`, those of all label values."""
        text = (await self.ask("/metrics")).body.decode()
        lines = re.findall(rf'requests_total{{direction="{direction}",.*}} (\d+)', text)
        return sum(map(int, lines))

    def events(self, name: str) -> list[dict[str, object]]:
        return [line for line in self.target.log if line["event"] == name]


@contextlib.asynccontextmanager
async def _site(tmp_path: Path, **environ: str) -> AsyncIterator[Site]:
    release = asyncio.Event()

    async def wait(_: Request) -> Response:
        await release.wait()
        return Response(200, [], b"waited\n")

    async with mesh(tmp_path) as one:
        await one.start("a")
        backend = one.backends["b"] = Backend("b")
        for each in one.backends.values():
            each.on("/wait", wait)
        app = one.app("b")
        config = tmp_path / "mesh.toml"
        config.write_text("")
        env = {**app.env, "MESH_BACKEND": str(await backend.start()), **environ}
        env["MESH_WORKERS"] = "2"
        async with sidecar_process(app.directory, env, config=config) as target:
            site = Site(one, target, backend, release, config, app.directory / "ready.json")
            await site.ready()
            yield site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with _site(tmp_path) as one:
        yield one


async def _ended(client: Client) -> bytes:
    async with asyncio.timeout(_PROMPT):
        return await client.closed()


# One sidecar to everybody.


async def test_they_serve_both_directions_and_are_counted_together(site: Site) -> None:
    """Each of many connections goes to one of them; the sums are exact, whoever is asked."""
    count = 60
    context = site.context()
    for _ in range(count):
        async with Client.connect(site.inbound, context) as caller:
            await caller.send(request())
            assert (await caller.answer()).status == 200
        async with Client.connect(site.outbound) as local:
            for _ in range(2):
                await local.send(site.to_a())
                assert (await local.answer()).status == 200
    for _ in range(8):
        assert await site.counted("inbound") == count
        assert await site.counted("outbound") == 2 * count
        status = json.loads((await site.ask("/status")).body)
        assert status["workers"] == 2
        assert status["traffic"]["inbound"]["requests"] == count
        assert status["traffic"]["outbound"]["requests"] == 2 * count
        assert status["decisions"] == {"allow": count, "deny": 0, "audit": 0}
        assert status["identity"]["fetched"] == 2, "each has an identity of its own"
    assert len(site.workers()) == 2


async def test_they_share_the_load(site: Site) -> None:
    """Connections that stay go to who has fewer, whoever is quicker."""
    before = [sockets(pid) for pid in site.workers()]
    async with contextlib.AsyncExitStack() as stack:
        answers: list[asyncio.Future[Answer]] = []

        async def more(count: int) -> None:
            for _ in range(count):
                client = await stack.enter_async_context(Client.connect(site.outbound))
                await client.send(site.to_a("/wait"))
                answers.append(asyncio.ensure_future(client.answer()))
            requests = site.mesh.backends["a"].requests
            await eventually(lambda: len(requests) == len(answers), 20)

        for pid in site.workers():
            os.kill(pid, signal.SIGSTOP)
            await more(32)  # for the other one
            os.kill(pid, signal.SIGCONT)
            await more(32)
            # Each connection here has one to the target.
            found = zip(site.workers(), before, strict=True)
            shares = [(sockets(one) - was) // 2 for one, was in found]
            assert min(shares) >= len(answers) // 8, shares  # how evenly, is for test_shares.py
        site.release.set()
        assert {answer.status for answer in await asyncio.gather(*answers)} == {200}


def sockets(pid: int) -> int:
    """Count the sockets of a process."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(link.readlink()).startswith("socket:")
    return found


async def test_ready_means_all_of_them(site: Site) -> None:
    """One that stands still is missed by the others."""
    for pid in site.workers():
        os.kill(pid, signal.SIGSTOP)
        try:
            # The one that stands still takes some of the connections, so they are let be.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROMPT):
                    answers = [asyncio.ensure_future(site.ask("/readyz")) for _ in range(4)]
                    done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
                    answer = done.pop().result()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert answer.status == 503
        reason = json.loads(answer.body)["checks"]["workers"]["reason"]
        assert re.fullmatch(r"worker [01] does not answer", reason)
        await asyncio.gather(*answers)
        await site.ready()


async def test_the_ready_file_is_the_supervisors(site: Site) -> None:
    told = json.loads(site.ready_file.read_text())
    assert told["pid"] == site.supervisor
    assert told["pid"] not in site.workers()
    assert len(site.events("ready")) == 2, "not before all of them are"
    site.target.signal(signal.SIGTERM)
    assert await site.target.exit_status() == 0
    assert not site.ready_file.exists()


async def test_each_renews_its_own_identity(tmp_path: Path) -> None:
    async with _site(tmp_path, MESH_CERT_LIFETIME="6s") as site:
        by_pid = dict.fromkeys(site.workers(), 0)
        await eventually(lambda: len(site.events("identity_renewed")) >= 2 * len(by_pid), 20)
        assert len(site.workers()) == 2
        async with site.caller() as caller:
            await caller.send(request())
            assert (await caller.answer()).status == 200
        generations = [line["generation"] for line in site.events("identity_renewed")]
        assert generations.count(2) == 2, generations


# One that dies.


async def test_a_killed_worker_is_replaced_and_only_its_requests_are_lost(site: Site) -> None:
    counted = Counted(site.mesh.backends["a"])
    load = Load(site.outbound, site.mesh.app_id("a"), clients=8)
    running = asyncio.ensure_future(load.run())
    await load.more()
    before = site.workers()
    os.kill(before[0], signal.SIGKILL)
    await eventually(lambda: len(site.workers()) == 2 and before[0] not in site.workers())
    await load.more(200)
    load.stop()
    async with asyncio.timeout(_PROMPT):
        await running
    assert before[1] in site.workers()
    assert load.refused == 0, "somebody always listens"
    assert len(load.broken) <= load.clients, "at most one on each of its connections"
    assert not load.codes
    assert set(load.answered) <= set(counted.seen)
    (died,) = site.events("worker_died")
    assert (died["pid"], died["exit_status"]) == (before[0], -9)
    await site.ready()


async def test_what_was_counted_is_never_less(site: Site) -> None:
    """A sum that falls is a restart to Prometheus, which would count all of it once more."""
    context = site.context()
    told = [0]

    async def look() -> None:
        with contextlib.suppress(ConnectionError):  # of the one that was just killed
            told.append(await site.counted("inbound"))

    for round_ in range(1, 4):
        for _ in range(20):
            async with Client.connect(site.inbound, context) as caller:
                await caller.send(request())
                await caller.answer()
        await look()
        assert told[-1] == 20 * round_
        victim = site.workers()[round_ % 2]
        os.kill(victim, signal.SIGKILL)
        while victim in site.workers() or len(site.workers()) < 2:
            await look()
        await look()
    await site.ready()
    assert await site.counted("inbound") == 60
    assert told == sorted(told)


async def test_a_successor_refuses_another_kms_as_its_siblings_do(tmp_path: Path) -> None:
    files, foreign = Files(tmp_path), Kms.create()
    async with mesh(tmp_path / "world", ["b"]) as one:
        app_id, kms = one.app_id("b"), one.world.kms
        files.write(kms.issue(app_id), kms.root_pem)
        env = {**one.app("b").env, **files.env, "MESH_WORKERS": "2"}
        async with sidecar_process(tmp_path, env) as target:
            for pid in children(target.process.pid):
                os.kill(pid, signal.SIGSTOP)  # or it would see the files, too
                files.write(foreign.issue(app_id), foreign.root_pem)
                os.kill(pid, signal.SIGKILL)

            def refused() -> int:
                return sum(line["event"] == "kms_root_changed" for line in target.log)

            await eventually(lambda: refused() >= 2, 20)
            files.write(kms.issue(app_id), kms.root_pem)
            await eventually(lambda: len([x for x in target.log if x["event"] == "ready"]) == 4, 20)


async def test_a_siblings_requests_go_on(site: Site) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(site.caller()) for _ in range(12)]
        for client in clients:
            await client.send(request("GET", "/wait"))
        answers = [asyncio.ensure_future(client.answer()) for client in clients]
        await eventually(lambda: len(site.backend.requests) == len(clients))
        victim = site.workers()[0]
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: len(site.workers()) == 2 and victim not in site.workers())
        site.release.set()
        found = await asyncio.gather(*answers, return_exceptions=True)
        alive = [one for one in found if isinstance(one, Answer)]
        assert {one.body for one in alive} == {b"waited\n"}
        assert 0 < len(alive) < len(clients)
    await site.ready()


async def test_who_waits_to_be_accepted_is_not_lost(site: Site) -> None:
    """Both stand still, so that connections queue in the kernel; then both are killed."""
    victims = site.workers()
    for pid in victims:
        os.kill(pid, signal.SIGSTOP)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client.connect(site.outbound)) for _ in "x" * 20]
        for client in clients:
            await client.send(site.to_a())
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for client in clients:
            assert (await client.answer()).status in (200, 503), "503: no identity yet"
    assert not {*victims} & {*site.workers()}
    await site.ready()  # or their first calls would still be on the way when the gateway ends


async def test_one_that_cannot_start_is_retried_with_growing_pauses(site: Site) -> None:
    """No more than that: its siblings serve, and nothing turns in circles."""
    before = site.target.cpu_seconds()
    for round_ in range(4):
        await eventually(lambda: len(site.workers()) == 2, 15)
        os.kill(site.workers()[-1], signal.SIGKILL)
        await eventually(lambda round_=round_: len(site.events("worker_died")) == round_ + 1)  # type: ignore[misc]
        async with Client.connect(site.outbound) as local:
            await local.send(site.to_a())
            assert (await local.answer()).status == 200
    died = site.events("worker_died")
    assert [line["restart_seconds"] for line in died] == [0.5, 1.0, 2.0, 4.0]
    assert len(site.events("worker_started")) == 2 + 3
    assert site.target.cpu_seconds() - before < 1.0


# The end.


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_all_finish_what_is_in_flight(
    site: Site, number: signal.Signals, status: int
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(site.caller()) for _ in range(8)]
        for client in clients:
            await client.send(request("GET", "/wait"))
        await eventually(lambda: len(site.backend.requests) == len(clients))
        workers = site.workers()

        site.target.signal(number)

        checks = await site.ready(False)
        assert checks["draining"]["reason"] == "the mesh is stopping"
        await nobody_listens(site.inbound)
        # The application still needs the mesh to answer what it was asked.
        for _ in range(8):
            async with Client.connect(site.outbound) as local:
                await local.send(site.to_a())
                assert (await local.answer()).status == 200
        assert site.target.process.returncode is None
        site.release.set()
        for client in clients:
            answer = await client.answer()
            assert (answer.body, answer.get(b"connection")) == (b"waited\n", b"close")
            assert await _ended(client) == b""
    assert await site.target.exit_status() == status
    assert not any(map(is_there, workers))
    await nobody_listens(site.outbound)
    assert len(site.events("stopped")) == 2
    assert not site.events("worker_died")


async def test_one_at_work_drains_alone(site: Site) -> None:
    """The other has nothing to do and ends; who is left serves outbound and answers for itself."""
    async with site.caller() as client:
        await client.send(request("GET", "/wait"))
        await eventually(lambda: len(site.backend.requests) == 1)
        site.target.signal(signal.SIGTERM)
        await eventually(lambda: len(site.workers()) == 1)
        for _ in range(4):
            async with Client.connect(site.outbound) as local:
                await local.send(site.to_a())
                assert (await local.answer()).status == 200
        assert "draining" in await site.ready(False)
        assert (await site.ask("/livez")).status == 200
        site.release.set()
        assert (await client.answer()).body == b"waited\n"
    assert await site.target.exit_status() == 0


async def test_a_signal_to_the_whole_group_still_drains(tmp_path: Path) -> None:
    """systemd sends SIGTERM to each process (KillMode=control-group), a terminal SIGINT."""
    async with _site(tmp_path) as site, site.caller() as client:
        await client.send(request("GET", "/wait"))
        await eventually(lambda: len(site.backend.requests) == 1)
        for pid in site.workers():
            os.kill(pid, signal.SIGTERM)
        await eventually(lambda: len(site.events("draining")) == 2)
        site.target.signal(signal.SIGTERM)  # which the supervisor passes on
        await site.ready(False)
        await nobody_listens(site.inbound)
        assert site.target.process.returncode is None
        site.release.set()
        assert (await client.answer()).body == b"waited\n"
        assert await site.target.exit_status() == 0


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130)],
)
async def test_a_second_signal_ends_it_at_once(
    site: Site, first: signal.Signals, second: signal.Signals, status: int
) -> None:
    workers = site.workers()
    async with site.caller() as client:
        await client.send(request("GET", "/wait"))
        await eventually(lambda: len(site.backend.requests) == 1)
        site.target.signal(first)
        await site.ready(False)
        started = time.monotonic()
        site.target.signal(second)
        assert await site.target.exit_status() == status
        assert time.monotonic() - started < _PROMPT
        assert await _ended(client) == b""
    await eventually(lambda: not any(map(is_there, workers)))
    site.release.set()


async def test_draining_takes_no_longer_than_its_limit(tmp_path: Path) -> None:
    async with _site(tmp_path, MESH_DRAIN_TIMEOUT="700ms") as site, site.caller() as client:
        await client.send(request("GET", "/wait"))
        await eventually(lambda: len(site.backend.requests) == 1)
        started = time.monotonic()
        site.target.signal(signal.SIGTERM)
        assert await site.target.exit_status() == 0
        assert 0.7 <= time.monotonic() - started < _PROMPT
        assert await _ended(client) == b""
        site.release.set()


async def test_one_that_stands_still_is_killed_in_the_end(tmp_path: Path) -> None:
    async with _site(tmp_path, MESH_DRAIN_TIMEOUT="100ms") as site:
        workers = site.workers()
        os.kill(workers[0], signal.SIGSTOP)
        site.target.signal(signal.SIGTERM)
        assert await site.target.exit_status() == 0
        assert len(site.events("workers_killed")) == 1
        assert not any(map(is_there, workers))


async def test_without_a_supervisor_they_end_by_themselves(site: Site) -> None:
    """And leave the addresses at once, while they finish what is in flight."""
    workers = site.workers()
    async with site.caller() as client:
        await client.send(request("GET", "/wait"))
        await eventually(lambda: len(site.backend.requests) == 1)
        site.target.signal(signal.SIGKILL)
        assert await site.target.exit_status() == -9
        for listener in ("inbound", "outbound", "admin"):
            await nobody_listens(site.target.address(listener))
        site.release.set()
        assert (await client.answer()).body == b"waited\n"
    await eventually(lambda: not any(map(is_there, workers)))


async def test_unix_sockets_stay_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with mesh(tmp_path / "world", ["b"]) as one:
        app = one.app("b")
        env = {**app.env, "MESH_ADMIN_LISTEN": f"unix:{path}", "MESH_WORKERS": "2"}
        async with sidecar_process(app.directory, env) as process:
            worker, _ = before = children(process.process.pid)
            found = os.lstat(path)
            os.kill(worker, signal.SIGTERM)  # an orderly end of a worker's own

            def replaced() -> bool:
                now = children(process.process.pid)
                return len(now) == 2 and now != before

            await eventually(replaced)
            assert os.path.samestat(os.lstat(path), found)
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(request("GET", "/livez"))
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            process.signal(signal.SIGTERM)
            assert await process.exit_status() == 0
        assert not path.exists()


# Reloading.


async def test_a_reload_is_in_effect_in_all_and_in_successors(site: Site) -> None:
    context = site.context()

    async def statuses() -> set[int]:
        found = set()
        for _ in range(12):
            async with Client.connect(site.inbound, context) as caller:
                await caller.send(request())
                answer = await caller.answer()
                if answer.status != 200:
                    problem(answer, "policy_denied", 403)
                found.add(answer.status)
        return found

    assert await statuses() == {200}
    site.config.write_text("drain_timeout = '1s'\n[inbound]\nallow = 'self'\n")
    site.target.signal(signal.SIGHUP)
    await eventually(lambda: len(site.events("settings_reloaded")) == 2)
    assert await statuses() == {403}

    # Refused by all; who takes a place later goes by the last that was in effect.
    site.config.write_text("[inbound]\nallow = 'nonsense'\n")
    site.target.signal(signal.SIGHUP)
    await eventually(lambda: len(site.events("settings_reload_failed")) == 2)
    await _replace_all(site)
    assert await statuses() == {403}

    # While nobody is there to hear it.
    for pid in site.workers():
        os.kill(pid, signal.SIGSTOP)
    victims = site.workers()
    site.config.write_text("[inbound]\nallow = 'any'\n")
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: len(site.events("worker_died")) == 4)
    site.target.signal(signal.SIGHUP)
    await eventually(lambda: len(site.events("settings_reloaded")) == 4, 20)
    await site.ready()
    assert await statuses() == {200}


async def _replace_all(site: Site) -> None:
    for pid in site.workers():
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda pid=pid: len(site.workers()) == 2 and pid not in site.workers())  # type: ignore[misc]
    await site.ready()


async def test_a_hangup_in_the_middle_of_the_start_ends_nothing(tmp_path: Path) -> None:
    """By default SIGHUP would end a worker."""
    async with mesh(tmp_path / "world", ["b"]) as one:
        app = one.app("b")
        env = {**clean_environ(), **app.env, "MESH_WORKERS": "2"}
        log = tmp_path / "log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(*COMMAND, "run", env=env, stderr=output)
        try:
            await eventually(lambda: b"worker_started" in log.read_bytes(), 20)
            for _ in range(20):
                process.send_signal(signal.SIGHUP)
                await asyncio.sleep(0.005)
            await eventually(lambda: log.read_bytes().count(b'"ready"') == 2, 20)
            await eventually(lambda: log.read_bytes().count(b"settings_reloaded") >= 2)
            assert b"worker_died" not in log.read_bytes()
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


# systemd.


async def test_systemd_hears_of_the_supervisor_alone(tmp_path: Path) -> None:
    address = f"@dstack-mesh-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        systemd.bind(f"\0{address[1:]}")
        systemd.setblocking(False)
        told: list[tuple[int, str]] = []
        """By which process, and what."""
        seen = 0

        def hear() -> list[str]:
            """Give what has been told that was not looked at yet."""
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, (credentials, *_), _, _ = systemd.recvmsg(65536, 128)
                    pid = int.from_bytes(credentials[2][:4], "little")
                    told.extend((pid, line) for line in data.decode().split("\n"))
            return [line for _, line in told[seen:]]

        async def until(line: str) -> None:
            nonlocal seen
            await eventually(lambda: line in hear(), 20)
            seen += hear().index(line) + 1

        environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "800000"}
        async with _site(tmp_path, **environ) as site:
            await until("READY=1")
            await until(f"STATUS=ready: app {site.mesh.app_id('b')} (2 workers)")
            for _ in range(3):
                await until("WATCHDOG=1")
            site.target.signal(signal.SIGHUP)
            await until("RELOADING=1")
            await until("READY=1")
            # One that stands still is what the watchdog is there for.
            victim = site.workers()[0]
            os.kill(victim, signal.SIGSTOP)
            await asyncio.sleep(1.0)  # its last sign has to be old, and so have those on their way
            seen += len(hear())
            await asyncio.sleep(0.5)  # two signs of its sibling's
            assert hear() == []
            os.kill(victim, signal.SIGCONT)
            await until("WATCHDOG=1")
            os.kill(victim, signal.SIGKILL)
            await eventually(lambda: any("being replaced" in line for line in hear()), 20)
            await until(f"STATUS=ready: app {site.mesh.app_id('b')} (2 workers)")
            site.target.signal(signal.SIGTERM)
            await until("STOPPING=1")
            assert await site.target.exit_status() == 0
            hear()
            assert {pid for pid, _ in told} == {site.supervisor}
            assert [line for _, line in told].count("READY=1") == 2

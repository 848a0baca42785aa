"""Ends, restarts and changes under a modest load lose what the contract allows, and no more.

A GET that has not been answered is never lost where it can be sent again: it ends in an answer, or
in a code that says it was not sent. What a backend has worked on is answered.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstack_mesh.dstack import gateway as directory
from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.fault_proxy import FaultProxy
from dstack_mesh.sim.gateway import Gateway
from dstack_mesh.sim.ports import loopback_host
from tests.integration.harness import Client, Mesh, eventually, mesh, request, tcp
from tests.integration.load import Counted, Load, load, unanswered
from tests.integration.processes import SidecarProcess, sidecar_process
from tests.integration.tls_peers import new_app_id

NOT_SENT = {"tls_failed", "connect_failed"}
METHODS = pytest.mark.parametrize("method", ["GET", "POST"])


@dataclass
class Site:
    mesh: Mesh
    process: SidecarProcess
    counted: Counted
    config: Path
    backend: str


@contextlib.asynccontextmanager
async def served_by_a_process(tmp_path: Path) -> AsyncIterator[Site]:
    """`b` is a process; `a` is here, and calls it."""
    async with mesh(tmp_path) as one:
        await one.start("a")
        backend = one.backends["b"] = Backend("b")
        counted = Counted(backend)
        app = one.app("b")
        config = tmp_path / "mesh.toml"
        config.write_text("")
        where = str(await backend.start())
        env = {**app.env, "MESH_BACKEND": where}
        async with sidecar_process(app.directory, env, config=config) as process:
            yield Site(one, process, counted, config, where)


@contextlib.asynccontextmanager
async def another_instance(site: Site) -> AsyncIterator[SidecarProcess]:
    """Have a second instance of `b`, with the same backend, behind the gateway."""
    app = site.mesh.app("b")
    host = loopback_host(new_app_id(), {one.host for one in site.mesh.world.apps.values()})
    port = tcp(app.env["MESH_INBOUND_LISTEN"]).port
    env = {
        **app.env,
        "MESH_BACKEND": site.backend,
        "MESH_INBOUND_LISTEN": f"{host}:{port}",
        "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
        "MESH_ADMIN_LISTEN": "127.0.0.1:0",
    }
    async with sidecar_process(site.mesh.app("a").directory, env) as process:
        site.mesh.world.gateway.add_route(app.app_id, host)
        yield process


@METHODS
async def test_an_instance_that_ends_while_another_serves(tmp_path: Path, method: str) -> None:
    """Of the callers' GETs not one fails; a POST may meet a connection that was just ended."""
    async with served_by_a_process(tmp_path / "w") as site:
        one = site.mesh
        async with another_instance(site):
            calls = Load(one.outbound("a"), one.app_id("b"), method)
            async with load(calls):
                site.process.signal(signal.SIGTERM)
                assert await site.process.exit_status() == 0
                await calls.more()
            assert not calls.broken
            assert set(calls.codes) <= (set() if method == "GET" else {"upstream_closed"})
            assert calls.codes.total() <= calls.clients, "one for each connection at the most"
            assert not unanswered(calls, site.counted)
            assert max(site.counted.seen.values()) == 1, "nothing was done twice"


async def test_the_only_instance_ends(tmp_path: Path) -> None:
    async with served_by_a_process(tmp_path / "w") as site:
        calls = Load(site.mesh.outbound("a"), site.mesh.app_id("b"))
        async with load(calls):
            site.process.signal(signal.SIGTERM)
            assert await site.process.exit_status() == 0
            await eventually(lambda: calls.codes.total() > 20)
        assert not calls.broken
        assert set(calls.codes) <= NOT_SENT
        assert not unanswered(calls, site.counted)
        assert site.process.log[-1]["event"] == "stopped"
        assert not [line for line in site.process.log if line["event"] == "drain_timeout"]


async def test_the_callers_own_mesh_ends(tmp_path: Path) -> None:
    """What it has taken it answers; a client that sends as it ends finds nothing done."""
    async with mesh(tmp_path) as one:
        await one.start("b")
        counted = Counted(one.backends["b"])
        app = one.app("a")
        async with sidecar_process(app.directory, app.env) as process:
            calls = Load(process.address("outbound"), one.app_id("b"))
            async with load(calls):
                process.signal(signal.SIGTERM)
                assert await process.exit_status() == 0
                await eventually(lambda: calls.refused > 0)
        assert not calls.codes
        assert not unanswered(calls, counted)
        assert len(calls.broken) <= calls.clients
        assert not set(calls.broken) & set(counted.seen)


@METHODS
async def test_a_reload_is_not_noticed(tmp_path: Path, method: str) -> None:
    async with served_by_a_process(tmp_path) as site:
        one = site.mesh
        calls = Load(one.outbound("a"), one.app_id("b"), method)
        async with load(calls):
            for count in range(1, 6):
                allow = "any" if count % 2 else one.app_id("a")
                site.config.write_text(f"[inbound]\nallow = '{allow}'")
                site.process.signal(signal.SIGHUP)

                def reloads() -> int:
                    log = site.process.log
                    return sum(line["event"] == "settings_reloaded" for line in log)

                await eventually(lambda count=count: reloads() == count)  # type: ignore[misc]
                await calls.more(20)
        assert (calls.codes, calls.broken, calls.refused) == ({}, [], 0)
        assert calls.connections == calls.clients
        assert sorted(calls.answered) == sorted(site.counted.seen)


@METHODS
async def test_an_agent_that_restarts_is_not_noticed_by_calls(tmp_path: Path, method: str) -> None:
    async with mesh(tmp_path) as one:
        for name in "ab":
            await one.start(name)
        counted = Counted(one.backends["b"])
        calls = Load(one.outbound("a"), one.app_id("b"), method)
        async with load(calls):
            for name in "ab":
                app = one.app(name)
                await app.agent.aclose()
                await calls.more(20)
                where = app.env["DSTACK_AGENT_ADDRESS"].removeprefix("unix:")
                await app.agent.start(UnixAddress(where))
                assert (await one.call(name, None, path="/info")).status == 200
                await calls.more(20)
        assert (calls.codes, calls.broken, calls.refused) == ({}, [], 0)
        assert sorted(calls.answered) == sorted(counted.seen)


async def test_a_gateway_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one is gone, another with another domain is at its address: it is found by itself."""
    monkeypatch.setattr(directory, "MIN_GAP", 0.1)
    async with mesh(tmp_path) as one, contextlib.AsyncExitStack() as stack:
        app = one.app("b")
        other = Gateway("other.dstack.test")
        stack.push_async_callback(other.aclose)
        new = await other.start()
        other.add_route(app.app_id, app.host)
        config = one.app("a").directory / "sys-config.json"

        between = FaultProxy(tcp(one.app("a").env["MESH_GATEWAY_CONNECT"]))
        stack.push_async_callback(between.aclose)
        address = await between.start()
        assert isinstance(address, TcpAddress)
        side = await one.start("a", MESH_GATEWAY_CONNECT=str(address))
        await one.start("b")
        counted = Counted(one.backends["b"])
        calls = Load(one.outbound("a"), one.app_id("b"))
        async with load(calls):
            config.write_text(json.dumps({"gateway_urls": [other.info_url]}))
            await between.aclose()
            await eventually(lambda: side.directory.text == f"other.dstack.test:{new.port}")
            after = FaultProxy(new)
            stack.push_async_callback(after.aclose)
            await after.start(address)
            await calls.more()
            calls.codes.clear()
            await calls.more()
            assert not calls.codes, "all is well again"
        assert not calls.broken
        assert len(unanswered(calls, counted)) <= calls.clients, "cut with the old gateway"


async def test_a_gateway_that_changes_costs_no_get_an_unclear_end(tmp_path: Path) -> None:
    """Connections cut by the gateway, again and again: a GET is sent once more, and answered."""
    async with mesh(tmp_path) as one:
        for name in "ab":
            await one.start(name)
        Counted(one.backends["b"])
        calls = Load(one.outbound("a"), one.app_id("b"))
        async with load(calls):
            for _ in range(5):
                one.world.gateway.drop_connections()
                await calls.more(40)
        assert not calls.broken
        assert set(calls.codes) <= {"upstream_closed", *NOT_SENT}
        assert calls.codes.total() <= 5, "only one that was cut twice in a row"


@METHODS
async def test_a_backend_that_restarts(tmp_path: Path, method: str) -> None:
    async with mesh(tmp_path) as one:
        for name in "ab":
            await one.start(name)
        backend = one.backends["b"]
        Counted(backend)
        where = one.sidecars["b"].settings.inbound.backend
        assert where is not None
        calls = Load(one.outbound("a"), one.app_id("b"), method)
        async with load(calls):
            await backend.aclose()
            await eventually(lambda: calls.codes.total() > 20)
            await backend.start(where)
            await calls.more()
            seen = set(calls.codes)
            calls.codes.clear()
            await calls.more()
            assert not calls.codes, "all is well again"
        assert not calls.broken
        lost = {"connect_failed; remote"}
        assert seen <= (lost if method == "GET" else {*lost, "upstream_closed; remote"})
        assert calls.connections == calls.clients, "an error costs no connection"


async def test_a_load_would_notice(tmp_path: Path) -> None:
    """The tests above can fail: a killed instance does lose what it was working on."""
    async with served_by_a_process(tmp_path) as site:
        one = site.mesh
        calls = Load(one.outbound("a"), one.app_id("b"), "POST")
        async with load(calls):
            site.process.process.kill()
            await eventually(lambda: calls.codes.total() > 20)
        assert calls.codes["upstream_closed"] > 0
        async with Client.connect(one.outbound("a")) as client:
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200

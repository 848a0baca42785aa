"""Each hop of a request broken in each way: the contract's code, nothing hangs, the next one works.

A `FaultProxy` stands in the hop: application to mesh, mesh to gateway and target, mesh to backend,
mesh to guest agent, mesh to the gateway's info call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import h11
import pytest

from dstack_mesh.dstack import gateway
from dstack_mesh.identity import store
from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.sim.fault_proxy import Fault, FaultProxy
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    eventually,
    mesh,
    problem,
    readyz,
    request,
    tcp,
)

SECONDS = 15.0
"""Nothing may take this long; the mesh's own limits are set to a fraction of a second."""

LIMITS = {
    "MESH_CONNECT_TIMEOUT": "500ms",
    "MESH_RESPONSE_TIMEOUT": "500ms",
    "MESH_HEAD_TIMEOUT": "500ms",
}
STATUS = {"connect_timeout": 504, "response_timeout": 504, "bad_request": 400}


@contextlib.asynccontextmanager
async def proxy(
    target: TcpAddress | UnixAddress, at: UnixAddress | None = None
) -> AsyncIterator[tuple[FaultProxy, TcpAddress | UnixAddress]]:
    one = FaultProxy(target)
    try:
        yield one, await one.start(at)
    finally:
        await one.aclose()


@dataclass
class Hop:
    """A mesh with a proxy in one of its hops, and the call that goes through it."""

    mesh: Mesh
    proxy: FaultProxy
    call: Callable[[str], Awaitable[Answer]]
    """Sends a GET for this path."""

    async def broken(self, fault: Fault | None, code: str, path: str = "/") -> str:
        """Have it end with `code`, or without an answer for an empty one; give the detail."""
        self.proxy.strike(Fault("truncate"))  # what was pooled would be used, and is whole
        self.proxy.fault = fault
        detail = ""
        async with asyncio.timeout(SECONDS):
            if code:
                answer = await self.call(path)
                detail = str(problem(answer, code, STATUS.get(code, 502))["detail"])
            else:
                with pytest.raises((OSError, h11.RemoteProtocolError)) as raised:
                    await self.call(path)
                assert not isinstance(raised.value, TimeoutError)
        self.proxy.fault = None
        await self.works()
        return detail

    async def works(self) -> None:
        """Hold the next request to its answer."""
        async with asyncio.timeout(SECONDS):
            assert (await self.call("/")).body == b"hello\n"


def _id(value: object) -> str:
    if isinstance(value, Fault):
        return f"{value.kind} {value.way} {value.at}"
    return str(value)


# Application to mesh.


@pytest.fixture
async def inward(tmp_path: Path) -> AsyncIterator[Hop]:
    async with mesh(tmp_path) as one:
        await one.start("a", **LIMITS)
        await one.start("b")
        async with proxy(one.outbound("a")) as (between, address):
            assert isinstance(address, TcpAddress)

            async def call(path: str) -> Answer:
                async with Client.connect(address) as client:
                    await client.send(
                        request("GET", path, [("x-dstack-target-app", one.app_id("b"))])
                    )
                    return await client.answer()

            yield Hop(one, between, call)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("garbage", "up", at=10), "bad_request"),
        (Fault("garbage", "up"), "bad_request"),
        (Fault("reset", "up"), ""),
        (Fault("reset", "up", at=30), ""),
        (Fault("truncate", "up", at=30), ""),
        (Fault("half-close", "up", at=30), ""),
        (Fault("blackhole", "up", at=30), ""),
        (Fault("drip", "up", at=30, seconds=0.1), ""),
        (Fault("delay", "up", at=30, seconds=2), ""),
        (Fault("reset", "down", at=20), ""),
        (Fault("truncate", "down", at=20), ""),
    ],
    ids=_id,
)
async def test_application_to_mesh(inward: Hop, fault: Fault, code: str) -> None:
    before = len(inward.mesh.backends["b"].requests)
    await inward.broken(fault, code)
    reached = len(inward.mesh.backends["b"].requests) - before - 1
    assert reached == (1 if fault.way == "down" else 0), "half a request goes nowhere"
    service = inward.mesh.sidecars["a"]._outbound
    await eventually(lambda: not service.connections)


async def test_a_slow_application_is_served(inward: Hop) -> None:
    inward.proxy.fault = Fault("drip", "up", at=5, seconds=0.001)
    await inward.works()
    inward.proxy.fault = Fault("drip", "down", seconds=0.001)
    await inward.works()


# Mesh to gateway and target.


@pytest.fixture
async def outward(tmp_path: Path) -> AsyncIterator[Hop]:
    async with mesh(tmp_path) as one:
        gateway_address = tcp(one.app("a").env["MESH_GATEWAY_CONNECT"])
        async with proxy(gateway_address) as (between, address):
            await one.start("a", MESH_GATEWAY_CONNECT=str(address), **LIMITS)
            await one.start("b")
            yield Hop(one, between, lambda path: one.call("a", "b", path=path))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("reset"), "tls_failed"),
        (Fault("reset", at=50), "tls_failed"),
        (Fault("reset", "up", at=50), "tls_failed"),
        (Fault("truncate"), "tls_failed"),
        (Fault("truncate", at=50), "tls_failed"),
        (Fault("truncate", "up", at=50), "tls_failed"),
        (Fault("half-close"), "tls_failed"),
        (Fault("half-close", "up", at=50), "tls_failed"),
        (Fault("garbage"), "tls_failed"),
        (Fault("garbage", at=200), "tls_failed"),
        (Fault("garbage", content=b"HTTP/1.1 400 Bad Request\r\n\r\n"), "tls_failed"),
        (Fault("blackhole"), "connect_timeout"),
        (Fault("blackhole", at=100), "connect_timeout"),
        (Fault("blackhole", "up", at=100), "connect_timeout"),
        (Fault("delay", seconds=5), "connect_timeout"),
        (Fault("drip", seconds=0.1), "connect_timeout"),
    ],
    ids=_id,
)
async def test_mesh_to_target_in_the_handshake(outward: Hop, fault: Fault, code: str) -> None:
    await outward.broken(fault, code)
    assert len(outward.mesh.backends["b"].requests) == 1, "the one that worked"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("reset"), "upstream_closed"),
        (Fault("truncate"), "upstream_closed"),
        (Fault("half-close"), "upstream_closed"),
        (Fault("garbage", content=bytes(40)), "upstream_closed"),
        (Fault("truncate", at=10), "upstream_closed"),
        (Fault("blackhole"), "response_timeout"),
        (Fault("delay", seconds=5), "response_timeout"),
    ],
    ids=_id,
)
async def test_mesh_to_target_while_it_answers(outward: Hop, fault: Fault, code: str) -> None:
    """The request has arrived and may have done its work: what is not idempotent is lost.

    A GET on a pooled connection is sent once more, where the connection has ended.
    """
    one = outward.mesh
    await outward.works()
    reached = one.backends["b"].requests
    for method in ("POST", "GET"):
        reached.clear()
        call = asyncio.ensure_future(one.call("a", "b", method, "/slow?seconds=0.3"))
        await eventually(lambda: len(reached) == 1)
        outward.proxy.strike(fault)
        async with asyncio.timeout(SECONDS):
            answer = await call
        if method == "GET" and code == "upstream_closed":
            assert (answer.body, len(reached)) == (b"hello\n", 2)
        else:
            problem(answer, code, STATUS.get(code, 502))
            assert len(reached) == 1
        await outward.works()


@pytest.mark.parametrize("kind", ["reset", "truncate", "half-close"])
async def test_a_pooled_connection_that_breaks_idle_is_nobodys_loss(
    outward: Hop, kind: str
) -> None:
    await outward.works()
    outward.proxy.strike(Fault(kind))  # type: ignore[arg-type]
    await outward.works()
    assert outward.proxy.connections == 2


@pytest.mark.parametrize(
    "fault",
    [Fault("reset", at=200_000), Fault("truncate", at=200_000), Fault("garbage", at=200_000)],
    ids=_id,
)
async def test_a_response_that_breaks_off_is_seen_as_such(outward: Hop, fault: Fault) -> None:
    await outward.broken(fault, "", "/download?bytes=1000000")


async def test_a_slow_target_is_waited_for(outward: Hop) -> None:
    outward.proxy.fault = Fault("delay", at=100, seconds=0.1)
    await outward.works()
    outward.proxy.fault = Fault("delay", "up", at=100, seconds=0.1)
    outward.proxy.strike(Fault("truncate"))
    await outward.works()


# Mesh to backend.


@pytest.fixture
async def backward(tmp_path: Path) -> AsyncIterator[Hop]:
    async with mesh(tmp_path) as one:
        backend = await one.start_backend("b")
        assert isinstance(backend, TcpAddress)
        async with proxy(backend) as (between, address):
            await one.start("a", MESH_RESPONSE_TIMEOUT="5s")
            await one.start("b", MESH_BACKEND=str(address), **LIMITS)
            yield Hop(one, between, lambda path: one.call("a", "b", path=path))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("reset"), "upstream_closed"),
        (Fault("reset", at=10), "upstream_closed"),
        (Fault("reset", "up", at=20), "upstream_closed"),
        (Fault("truncate"), "upstream_closed"),
        (Fault("truncate", at=10), "upstream_closed"),
        (Fault("truncate", "up", at=20), "upstream_closed"),
        (Fault("half-close"), "upstream_closed"),
        (Fault("half-close", at=10), "upstream_closed"),
        (Fault("garbage"), "upstream_protocol_error"),
        (Fault("garbage", at=10), "upstream_protocol_error"),
        (Fault("blackhole"), "response_timeout"),
        (Fault("blackhole", "up", at=20), "response_timeout"),
        (Fault("delay", seconds=5), "response_timeout"),
    ],
    ids=_id,
)
async def test_mesh_to_backend(backward: Hop, fault: Fault, code: str) -> None:
    await backward.broken(fault, code)
    service = backward.mesh.sidecars["b"]._inbound
    assert len(service.connections) <= 1, "nothing is left but the pooled one of `a`"


@pytest.mark.parametrize(
    "fault", [Fault("reset", at=200_000), Fault("truncate", at=200_000)], ids=_id
)
async def test_a_backends_response_that_breaks_off(backward: Hop, fault: Fault) -> None:
    await backward.broken(fault, "", "/download?bytes=1000000")
    await backward.broken(fault, "", "/download-chunked?bytes=1000000")


async def test_a_slow_backend_is_waited_for(backward: Hop) -> None:
    for fault in (Fault("drip", seconds=0.001), Fault("drip", "up", seconds=0.001)):
        backward.proxy.fault = fault
        backward.proxy.strike(Fault("truncate"))
        await backward.works()


async def test_a_backend_that_is_gone_and_comes_back(backward: Hop) -> None:
    await backward.works()
    before = backward.proxy.target
    await backward.mesh.backends["b"].aclose()
    backward.proxy.strike(Fault("truncate"))
    backward.proxy.target = before
    problem(await backward.call("/"), "upstream_closed", 502)
    await backward.mesh.backends["b"].start(before)
    await backward.works()


# Mesh to guest agent.


@pytest.fixture
async def agentward(tmp_path: Path) -> AsyncIterator[Hop]:
    async with mesh(tmp_path) as one:
        agent = UnixAddress(one.app("a").env["DSTACK_AGENT_ADDRESS"].removeprefix("unix:"))
        async with proxy(agent, UnixAddress(str(tmp_path / "p.sock"))) as (between, address):
            await one.start("a", DSTACK_AGENT_ADDRESS=str(address), **LIMITS)

            async def call(path: str) -> Answer:
                answer = await one.call("a", None, path="/info" if path == "/" else path)
                if answer.status == 200:
                    assert json.loads(answer.body)["app_id"] == one.app_id("a")
                    answer.body = b"hello\n"
                return answer

            yield Hop(one, between, call)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("reset"), "agent_unavailable"),
        (Fault("reset", at=10), "agent_unavailable"),
        (Fault("truncate"), "agent_unavailable"),
        (Fault("truncate", at=10), "agent_unavailable"),
        (Fault("truncate", "up", at=10), "agent_unavailable"),
        (Fault("half-close"), "agent_unavailable"),
        (Fault("garbage"), "upstream_protocol_error"),
        (Fault("blackhole"), "response_timeout"),
        (Fault("blackhole", "up"), "response_timeout"),
        (Fault("delay", seconds=5), "response_timeout"),
    ],
    ids=_id,
)
async def test_mesh_to_agent(agentward: Hop, fault: Fault, code: str) -> None:
    agentward.proxy.strike(Fault("truncate"))
    await agentward.broken(fault, code)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset"),
        Fault("truncate", at=300),
        Fault("garbage"),
        Fault("garbage", at=300),
        Fault("half-close"),
    ],
    ids=_id,
)
async def test_an_identity_that_the_agent_cannot_give_yet(
    tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "FIRST_RETRY", 0.1)
    async with mesh(tmp_path) as one:
        agent = UnixAddress(one.app("a").env["DSTACK_AGENT_ADDRESS"].removeprefix("unix:"))
        async with proxy(agent, UnixAddress(str(tmp_path / "p.sock"))) as (between, address):
            between.fault = fault
            side = await one.start_closed(
                "a",
                DSTACK_AGENT_ADDRESS=str(address),
                MESH_OUTBOUND_LISTEN="127.0.0.1:0",
                MESH_ADMIN_LISTEN="127.0.0.1:0",
            )
            await one.start("b")
            await eventually(lambda: side.identity.failed > 1)
            detail = problem(await one.call("a", "b"), "identity_unavailable", 503)["detail"]
            assert str(tmp_path / "p.sock") in str(detail)
            assert (await readyz(one, "a"))[0] == 503
            between.fault = None
            async with asyncio.timeout(SECONDS):
                await side.wait_open()
            await eventually(lambda: side.directory.current is not None)
            assert (await one.call("a", "b")).status == 200


# Mesh to the gateway's info call.


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset"),
        Fault("reset", at=100),
        Fault("truncate", at=100),
        Fault("garbage"),
        Fault("half-close", at=1000),
        Fault("blackhole"),
    ],
    ids=_id,
)
async def test_mesh_to_the_gateways_info(
    tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "FIRST_RETRY", 0.1)
    monkeypatch.setattr(gateway, "ASK_TIMEOUT", 0.3)
    async with mesh(tmp_path) as one:
        url = one.world.gateway.info_url
        async with proxy(tcp(url.removeprefix("https://"))) as (between, address):
            between.fault = fault
            config = tmp_path / "sys.json"
            config.write_text(json.dumps({"gateway_urls": [f"https://{address}"]}))
            side = await one.start_closed(
                "a",
                MESH_SYS_CONFIG=str(config),
                MESH_OUTBOUND_LISTEN="127.0.0.1:0",
                MESH_ADMIN_LISTEN="127.0.0.1:0",
            )
            await one.start("b")
            await side.wait_open()
            await eventually(lambda: between.connections > 1)
            detail = problem(await one.call("a", "b"), "gateway_unknown", 503)["detail"]
            assert f"https://{address}" in str(detail)
            between.fault = None
            await eventually(lambda: side.directory.current is not None, SECONDS)
            assert (await one.call("a", "b")).status == 200

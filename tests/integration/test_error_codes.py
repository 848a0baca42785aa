"""Every error code of the contract's table, reached from a real cause.

A code without a cause here fails `test_the_table_is_whole`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dstack_mesh import errors
from dstack_mesh.errors import MeshError
from dstack_mesh.sim.fault_proxy import Fault, FaultProxy
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.kms import Kms
from tests.integration.harness import Answer, Client, Mesh, eventually, mesh, problem, tcp
from tests.integration.tls_peers import any_answer, call_inbound, caller_context, new_app_id

Cause = Callable[[Mesh], Awaitable[Answer]]

CAUSES: dict[str, Cause] = {}

NOT_YET: frozenset[str] = frozenset()
"""Codes of the table whose feature is not there yet."""


def cause(code: str) -> Callable[[Cause], Cause]:
    def keep(function: Cause) -> Cause:
        assert code not in CAUSES
        CAUSES[code] = function
        return function

    return keep


async def raw(one: Mesh, name: str, data: bytes) -> Answer:
    async with Client.connect(one.outbound(name)) as client:
        await client.send(data)
        return await client.answer()


async def by_way_of(one: Mesh, fault: Fault, **environ: str) -> Answer:
    """Call `b` with `fault` between `a` and the gateway."""
    proxy = FaultProxy(tcp(one.app("a").env["MESH_GATEWAY_CONNECT"]))
    proxy.fault = fault
    try:
        address = await proxy.start()
        await one.start("a", MESH_GATEWAY_CONNECT=str(address), **environ)
        return await one.call("a", "b")
    finally:
        await proxy.aclose()


async def before(one: Mesh, fault: Fault, **environ: str) -> Answer:
    """Call `b` with `fault` between its mesh and its backend."""
    backend = await one.start_backend("b")
    proxy = FaultProxy(backend)
    proxy.fault = fault
    try:
        await one.start("b", MESH_BACKEND=str(await proxy.start()), **environ)
        await one.start("a")
        return await one.call("a", "b")
    finally:
        await proxy.aclose()


async def impostor(one: Mesh, there: Impostor) -> Answer:
    """Call `b`, where `there` answers in its place."""
    with there:
        await one.start("a", MESH_GATEWAY_CONNECT=str(there.address))
        return await one.call("a", "b")


async def inbound(one: Mesh, context: ssl.SSLContext) -> Answer:
    """Call `b` directly over TLS."""
    await one.start("b")
    return await call_inbound(one.inbound("b"), context)


@cause("bad_request")
async def _(one: Mesh) -> Answer:
    await one.start("a")
    both = "Content-Length: 1\r\nTransfer-Encoding: chunked"
    return await raw(one, "a", f"POST / HTTP/1.1\r\nHost: a\r\n{both}\r\n\r\n0\r\n\r\n".encode())


@cause("bad_target")
async def _(one: Mesh) -> Answer:
    await one.start("a")
    return await one.call("a", "no app-id")


@cause("header_too_large")
async def _(one: Mesh) -> Answer:
    await one.start("a")
    return await one.call("a", "b", headers=[(f"x-{n}", "1") for n in range(130)])


@cause("uri_too_long")
async def _(one: Mesh) -> Answer:
    await one.start("a")
    return await one.call("a", "b", path="/" + "x" * 17 * 1024)


@cause("policy_denied")
async def _(one: Mesh) -> Answer:
    await one.start("a")
    await one.start("b", MESH_ALLOWED_APPS="self")
    return await one.call("a", "b")


@cause("client_cert_required")
async def _(one: Mesh) -> Answer:
    return await inbound(one, caller_context(one.world.kms.root_pem, None))


@cause("client_cert_untrusted")
async def _(one: Mesh) -> Answer:
    kms = one.world.kms
    return await inbound(one, caller_context(kms.root_pem, kms.issue_local()))


@cause("peer_untrusted")
async def _(one: Mesh) -> Answer:
    foreign = Kms.create().issue(one.app_id("b"))
    return await impostor(one, Impostor(foreign, answer=any_answer))


@cause("peer_app_id_mismatch")
async def _(one: Mesh) -> Answer:
    other = one.world.kms.issue(new_app_id())
    return await impostor(one, Impostor(other, answer=any_answer))


@cause("peer_rejected_us")
async def _(one: Mesh) -> Answer:
    right, root = one.world.kms.issue(one.app_id("b")), Kms.create().root_pem
    return await impostor(one, Impostor(right, client_ca_pem=root, answer=any_answer))


@cause("tls_failed")
async def _(one: Mesh) -> Answer:
    await one.start("a")  # nobody runs `b`, so the gateway ends the connection
    return await one.call("a", "b")


@cause("connect_failed")
async def _(one: Mesh) -> Answer:
    await one.start("a")
    await one.world.gateway.stop_accepting()
    return await one.call("a", "b")


@cause("connect_timeout")
async def _(one: Mesh) -> Answer:
    return await by_way_of(one, Fault("blackhole"), MESH_CONNECT_TIMEOUT="300ms")


@cause("upstream_protocol_error")
async def _(one: Mesh) -> Answer:
    return await before(one, Fault("garbage"))


@cause("upstream_closed")
async def _(one: Mesh) -> Answer:
    return await before(one, Fault("truncate", at=5))


@cause("response_timeout")
async def _(one: Mesh) -> Answer:
    return await before(one, Fault("blackhole"), MESH_RESPONSE_TIMEOUT="300ms")


@cause("identity_unavailable")
async def _(one: Mesh) -> Answer:
    one.app("a").agent.failing = True
    await one.start_closed("a", MESH_OUTBOUND_LISTEN="127.0.0.1:0")
    return await one.call("a", "b")


@cause("gateway_unknown")
async def _(one: Mesh) -> Answer:
    side = await one.start_closed(
        "a", MESH_OUTBOUND_LISTEN="127.0.0.1:0", MESH_SYS_CONFIG="/nowhere"
    )
    await side.identity.wait_loaded()
    return await one.call("a", "b")


@cause("agent_unavailable")
async def _(one: Mesh) -> Answer:
    await one.start("a")
    await one.app("a").agent.aclose()
    return await one.call("a", None, path="/info")


@cause("agent_denied")
async def _(one: Mesh) -> Answer:
    await one.start("a", MESH_AGENT_EXPOSE="info")
    return await one.call("a", None, path="/get_key")


@cause("overloaded")
async def _(one: Mesh) -> Answer:
    side = await one.start("a", MESH_MAX_CONNECTIONS="1")
    async with Client.connect(one.outbound("a")):
        await eventually(lambda: len(side._outbound.connections) == 1)
        return await one.call("a", "b")


KINDS = {kind.code: kind for kind in MeshError.__subclasses__()}


@pytest.mark.parametrize("code", sorted(CAUSES))
async def test_a_real_cause_gives_the_code(tmp_path: Path, code: str) -> None:
    kind = KINDS[code]
    async with asyncio.timeout(20), contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(mesh(tmp_path))
        answer = await CAUSES[code](one)
        fields = problem(answer, code, kind.status)
    assert fields["title"] == kind.title
    waited = answer.get(b"retry-after")
    assert waited == (None if kind.retry_after is None else b"%d" % kind.retry_after)


def test_the_table_is_whole() -> None:
    named = {
        one.code
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, MeshError) and one is not MeshError
    }
    assert named == set(KINDS), "a code of a subclass of a subclass"
    assert set(CAUSES) | NOT_YET == named, "a code without a cause, or a cause without a code"
    assert not set(CAUSES) & NOT_YET

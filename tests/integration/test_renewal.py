"""The mesh's own identity over time, while requests go on."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.identity import store
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.sidecar import Sidecar
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.messages import Answer, Request, Response
from tests.integration.harness import Client, Mesh, eventually, mesh, problem, readyz, request
from tests.integration.tls_peers import caller_context, new_app_id

LIFETIME = "3s"
"""Renewed after 1 to 2 seconds: certificates know whole seconds only."""


def generation(sidecar: Sidecar) -> int:
    current = sidecar.identity.current
    return current.generation if current is not None else 0


async def keep_calling(one: Mesh, method: str, body: bytes, until: asyncio.Event) -> int:
    """Call `b` by way of `a` on one kept connection, with no pause; count the calls."""
    fields = [("x-dstack-target-app", one.app_id("b"))]
    async with Client.connect(one.outbound("a")) as client:
        for calls in itertools.count():
            if until.is_set():
                return calls
            await client.send(request(method, "/upload", fields, body))
            answer = await client.answer(method)
            assert answer.status == 200, (calls, answer)
            assert json.loads(answer.body)["bytes"] == len(body)
    raise AssertionError


async def test_no_request_fails_while_both_sides_renew(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        sides = [
            await one.start("a", backend=False, MESH_CERT_LIFETIME=LIFETIME),
            await one.start("b", MESH_CERT_LIFETIME=LIFETIME),
        ]
        over = asyncio.Event()
        async with Client.connect(one.outbound("a")) as tunnel, asyncio.TaskGroup() as group:
            fields: list[tuple[str, str]] = [("x-dstack-target-app", one.app_id("b"))]
            fields += [("connection", "upgrade"), ("upgrade", "echo")]
            await tunnel.send(request("GET", "/ws", fields))
            assert b" 101 " in await tunnel.until(b"\r\n\r\n")
            callers = [
                group.create_task(keep_calling(one, method, body, over))
                for method, body in [
                    ("GET", b""),
                    ("POST", b"x" * 20_000),
                    ("PUT", b""),
                    ("POST", b"y"),
                ]
            ]
            await eventually(lambda: all(generation(side) >= 4 for side in sides), 20)
            over.set()
            await tunnel.send(b"still here")
            assert await tunnel.until(b"still here") == b"still here"
        assert all(task.result() > 100 for task in callers)
        assert [side.identity.failed for side in sides] == [0, 0]

        def ages() -> list[int]:
            return [getattr(up, "generation", 0) for up in sides[0].worker.upstreams]

        # What an older identity made is gone, but for the tunnel that was just in use.
        await eventually(lambda: sum(age < generation(sides[0]) for age in ages()) <= 1)
        assert len(ages()) <= len(callers) + 2


async def test_a_connection_of_the_older_identity_ends_with_a_response(tmp_path: Path) -> None:
    async with mesh(tmp_path, ["b"]) as one:
        side = await one.start("b", MESH_CERT_LIFETIME=LIFETIME)
        kms = one.world.kms
        context = caller_context(kms.root_pem, kms.issue(new_app_id()))
        async with (
            Client.connect(one.inbound("b"), context) as idle,
            Client.connect(one.inbound("b"), context) as busy,
        ):
            await idle.send(request("GET", "/"))
            assert (await idle.answer()).get(b"connection") is None
            head = request("POST", "/mirror", [("content-length", "6")])
            await busy.send(head + b"one")
            await eventually(lambda: one.backends["b"].requests[-1].method == "POST")
            before = generation(side)
            await eventually(lambda: generation(side) > before)
            await busy.send(b"two")
            await idle.send(request("GET", "/"))
            for client, method in ((busy, "POST"), (idle, "GET")):
                answer = await client.answer(method)
                assert answer.status == 200
                assert answer.get(b"connection") == b"close"
                assert await client.closed() == b""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again and look again soon; how soon in earnest is tested with the store."""
    monkeypatch.setattr(store, "FIRST_RETRY", 0.1)
    monkeypatch.setattr(store, "LAST_RETRY", 0.2)
    monkeypatch.setattr(store, "POLL", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_an_agent_that_fails_for_a_while(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        side = await one.start("a", backend=False, MESH_CERT_LIFETIME=LIFETIME)
        await one.start("b")
        agent = one.app("a").agent
        agent.failing = True
        await eventually(lambda: side.identity.failed > 0)
        assert (await readyz(one, "a"))[0] == 200
        assert (await one.call("a", "b")).status == 200, "the last good one serves"
        current = side.identity.current
        assert current is not None
        await eventually(lambda: time.time() >= current.not_after)
        detail = str(problem(await one.call("a", "b"), "identity_unavailable", 503)["detail"])
        assert "expired at" in detail
        assert "simulated failure" in detail, "why there is no newer one"
        assert await readyz(one, "a") == (503, detail)
        served = len(one.backends["b"].requests)
        agent.failing = False
        await eventually(lambda: generation(side) > current.generation)
        assert (await readyz(one, "a"))[0] == 200
        assert (await one.call("a", "b")).status == 200
        assert len(one.backends["b"].requests) == served + 1


async def renew(side: Sidecar) -> str | None:
    """Renew now; give why it failed, None when it did not."""
    return await side.identity._fetch()


async def test_a_root_made_again_with_the_same_key(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        a, b = await one.start("a"), await one.start("b")
        one.world.kms.remake_root()
        for side in (b, a):
            assert await renew(side) is None
            one.world.gateway.drop_connections()  # so that both ways shake hands anew
            for caller, target in (("a", "b"), ("b", "a")):
                assert (await one.call(caller, target)).status == 200
        assert (generation(a), generation(b)) == (2, 2)


async def test_another_kms_is_not_taken_for_a_renewal(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        a = await one.start("a", backend=False)
        await one.start("b")
        one.app("a").agent.kms = Kms.create()
        assert "another KMS root key" in str(await renew(a))
        one.world.gateway.drop_connections()
        assert (await one.call("a", "b")).status == 200
        assert generation(a) == 1


def to_targets(side: Sidecar) -> list[Upstream]:
    """Give the connections to other apps, those in use and those kept."""
    found = [one for one in side.worker.upstreams if isinstance(one, Upstream)]
    return [one for one in found if one.peer is not None]


async def test_outbound_connections_of_the_older_identity_go(tmp_path: Path) -> None:
    """Idle ones at once, for a new one; one in use first finishes what it carries."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def halves() -> AsyncIterator[bytes]:
        yield b"one,"
        begun.set()
        await go_on.wait()
        yield b"two"

    async def held(_: Request) -> Answer:
        return Response(200, [], halves())

    async with mesh(tmp_path) as one:
        a = await one.start("a", backend=False)
        await one.start("b")
        one.backends["b"].on("/held", held)
        in_use = asyncio.create_task(one.call("a", "b", path="/held"))
        await begun.wait()
        assert (await one.call("a", "b")).status == 200
        assert [up.generation for up in to_targets(a)] == [1, 1]
        at_gateway = one.world.gateway.connections
        assert at_gateway.total() == 2
        assert await renew(a) is None
        await eventually(lambda: sorted(up.generation for up in to_targets(a)) == [1, 2])
        assert not in_use.done()
        go_on.set()
        assert (await in_use).body == b"one,two"
        await eventually(lambda: [up.generation for up in to_targets(a)] == [2])
        for _ in range(2):
            assert (await one.call("a", "b")).status == 200
        assert at_gateway.total() == 3, "the new connection, and that one is kept"
        assert [up.generation for up in to_targets(a)] == [2]


async def shown_leaf(one: Mesh, name: str) -> bytes:
    """Give the certificate (DER) that an app's inbound side shows now."""
    context = caller_context(one.world.kms.root_pem)
    async with Client.connect(one.inbound(name), context) as client:
        tls: ssl.SSLObject = client.writer.get_extra_info("ssl_object")
        leaf = tls.getpeercert(binary_form=True)
    assert leaf is not None
    return leaf


async def test_the_new_leaf_is_what_callers_are_shown(tmp_path: Path) -> None:
    async with mesh(tmp_path, ["b"]) as one:
        b = await one.start("b")
        first = await shown_leaf(one, "b")
        assert await shown_leaf(one, "b") == first
        assert await renew(b) is None
        assert await shown_leaf(one, "b") != first


@pytest.mark.usefixtures("impatient")
async def test_a_target_that_is_not_renewed_is_refused_when_it_expires(tmp_path: Path) -> None:
    """On the connection that was good before, too: it is not used again."""
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False)
        b = await one.start("b", MESH_CERT_LIFETIME=LIFETIME)
        one.app("b").agent.failing = True
        assert (await one.call("a", "b")).status == 200
        expiry = b.identity.require().not_after
        await eventually(lambda: time.time() >= expiry)
        served = len(one.backends["b"].requests)
        refused = problem(await one.call("a", "b"), "peer_untrusted", 502)
        assert "expired" in str(refused["detail"])
        assert len(one.backends["b"].requests) == served
        one.app("b").agent.failing = False
        await eventually(lambda: generation(b) > 1)
        assert (await one.call("a", "b")).status == 200

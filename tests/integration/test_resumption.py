"""Sidecars resume their TLS sessions, with whom they were made and for as long as that lasts."""

from __future__ import annotations

from pathlib import Path

from dstack_mesh.app import Sidecar
from dstack_mesh.relay.upstream import Upstream
from tests.integration.harness import Mesh, eventually, mesh
from tests.integration.test_renewal import generation


def to_targets(side: Sidecar) -> list[Upstream]:
    return [
        one for one in side.worker.upstreams if isinstance(one, Upstream) and one.peer is not None
    ]


def resumed(upstream: Upstream) -> bool:
    return bool(upstream.transport.get_extra_info("ssl_object").session_reused)


async def call_anew(one: Mesh, side: Sidecar) -> bool:
    """Call on a connection of its own; tell whether its session was a resumed one."""
    for upstream in to_targets(side):
        upstream.close()
    await eventually(lambda: not to_targets(side))
    answer = await one.call("a", "b", "POST", "/echo", body=b"x")
    assert answer.status == 200
    (upstream,) = to_targets(side)
    assert upstream.peer is not None
    assert upstream.peer.app_id == one.app_id("b")
    return resumed(upstream)


async def test_a_second_connection_resumes_the_first_ones_session(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        side = await one.start("a", backend=False)
        await one.start("b")
        assert not await call_anew(one, side)
        for _ in range(3):
            assert await call_anew(one, side)


async def test_a_targets_new_identity_ends_its_sessions(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        caller, target = await one.start("a", backend=False), await one.start("b")
        await call_anew(one, caller)
        assert await call_anew(one, caller)
        assert await target.identity._fetch() is None
        assert not await call_anew(one, caller), "a full handshake, and no error"
        assert await call_anew(one, caller)


async def test_a_callers_new_identity_ends_its_sessions(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        side = await one.start("a", backend=False)
        await one.start("b")
        await call_anew(one, side)
        assert await call_anew(one, side)
        before = generation(side)
        assert await side.identity._fetch() is None
        await eventually(lambda: [up.generation for up in to_targets(side)] == [before + 1])
        assert not resumed(to_targets(side)[0]), "the connection that is kept ready is a new one"


async def test_the_caller_is_known_to_the_backend_of_a_resumed_session(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        side = await one.start("a", backend=False)
        await one.start("b")
        await call_anew(one, side)
        assert await call_anew(one, side)
        answer = await one.call("a", "b", "GET", "/echo")
        assert one.app_id("a").encode() in answer.body


async def test_where_1_2_is_allowed_nothing_is_resumed(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        side = await one.start("a", backend=False, MESH_TLS_MIN_VERSION="1.2")
        await one.start("b", MESH_TLS_MIN_VERSION="1.2")
        for _ in range(3):
            assert not await call_anew(one, side)

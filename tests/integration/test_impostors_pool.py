"""Pooled connections: good for the app, name and identity they were made for, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dstack_mesh.model import AppId
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.odd import WRONG_TARGETS, Kind, impostor_chain
from tests.integration.harness import Client, eventually, mesh, problem, request
from tests.integration.tls_peers import (
    VERSIONS,
    Attacked,
    all_over,
    any_answer,
    attacked,
    new_app_id,
    real_chain,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

OTHER = AppId("bb" * 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Attacked]:
    async with attacked(tmp_path_factory.mktemp("world"), "1.3") as one:
        yield one


class Turncoat(Impostor):
    """Good for one request; then it waits for the next, hangs up on it and shows another chain."""

    def __init__(self, good: Issued, bad: Issued) -> None:
        self._bad = bad
        self._heads = 0
        # Whoever holds the keys of a session is who made it: another would have none to resume.
        super().__init__(good, answer=self._turn, tickets=False)
        self.before = b""
        """What came while it was good."""

    def _turn(self, received: bytes) -> bytes | None:
        if b"\r\n\r\n" not in received:
            return None
        self._heads += 1
        if self._heads == 1:
            return any_answer(received)
        self.show(self._bad)
        self.before = self.received
        self.drop_connections()
        return None


@pytest.mark.parametrize("kind", WRONG_TARGETS)
async def test_a_retry_meets_an_impostor(there: Attacked, kind: Kind) -> None:
    """A pooled connection dies under a request, which may be repeated: but only to the target."""
    app_id = new_app_id()
    bad = impostor_chain(there.kms, kind, app_id, OTHER)
    with Turncoat(real_chain(there.kms, app_id, bad), bad) as target:
        there.route(app_id, target)
        await there.make_pooled(app_id, target)
        answer = await there.mesh.call("a", app_id, path="/secret")
        code = "peer_app_id_mismatch" if kind is Kind.OTHER_APP else "peer_untrusted"
        problem(answer, code, 502)
        await all_over(target)
        assert target.connections == 2
        assert target.resumed == 0
        assert target.before.count(b"/secret") == 1
        assert target.received == target.before


async def test_what_is_not_idempotent_is_not_sent_again(there: Attacked) -> None:
    app_id = new_app_id()
    good = there.kms.issue(app_id)
    with Turncoat(good, good) as target:
        there.route(app_id, target)
        await there.make_pooled(app_id, target)
        answer = await there.mesh.call("a", app_id, "POST", "/secret", body=b"once")
        problem(answer, "upstream_closed", 502)
        await all_over(target)
        assert target.connections == 1
        assert target.received.count(b"/secret") == 1


async def test_many_at_once_meet_an_impostor(there: Attacked) -> None:
    app_id = new_app_id()
    chain = impostor_chain(there.kms, Kind.APP_CA_OF_OTHER_APP, app_id, OTHER)
    with there.impostor(chain) as impostor:
        there.route(app_id, impostor)
        calls = [there.mesh.call("a", app_id, "POST", body=b"secret") for _ in range(20)]
        for answer in await asyncio.gather(*calls):
            problem(answer, "peer_untrusted", 502)
        await all_over(impostor)
        assert 3 <= impostor.handshakes <= 20, "who waits when all fails shares the error"
        assert impostor.application_bytes == 0


def slow_at_busy(received: bytes) -> bytes | None:
    return None if b"/busy" in received else any_answer(received)


async def test_another_instance_of_the_app_is_an_impostor(there: Attacked) -> None:
    """The gateway takes turns: one verified instance says nothing about the next one."""
    app_id = new_app_id()
    bad = impostor_chain(there.kms, Kind.OTHER_APP, app_id, OTHER)
    with Impostor(there.kms.issue(app_id), answer=slow_at_busy) as real:
        there.route(app_id, real)
        await there.make_pooled(app_id, real)
        with there.impostor(bad) as impostor:
            there.mesh.world.gateway.remove_route(app_id)
            there.route(app_id, impostor)
            async with Client.connect(there.mesh.outbound("a")) as busy:
                await busy.send(request("GET", "/busy", [("x-dstack-target-app", app_id)]))
                await eventually(lambda: b"/busy" in real.received)
                # The pooled connection is in use, so this one needs its own.
                problem(await there.mesh.call("a", app_id), "peer_app_id_mismatch", 502)
            await all_over(impostor)
            assert impostor.handshakes == 1
            assert impostor.application_bytes == 0
        assert real.handshakes == 1


async def test_another_app_at_the_same_address_gets_no_connection_of_the_first(
    tmp_path: Path,
) -> None:
    one, other = new_app_id(), new_app_id()
    async with mesh(tmp_path) as world:
        there = Attacked(world, VERSIONS["1.3"])
        with there.impostor(there.kms.issue(one)) as target:
            fixed = {"MESH_GATEWAY": f"fixed/{target.address}", "MESH_GATEWAY_CONNECT": "unset"}
            await world.start("a", backend=False, **fixed)
            await there.make_pooled(one, target)
            received = target.received
            problem(await there.mesh.call("a", other), "peer_app_id_mismatch", 502)
            await eventually(lambda: target.closed == 1)
            assert target.handshakes == 2
            assert target.received == received
            assert (await there.mesh.call("a", one)).status == 200
            assert target.handshakes == 2, "the first one's connection serves it still"


@pytest.mark.parametrize("header", ["x-dstack-target-port", "x-dstack-target-instance"])
async def test_another_name_of_the_app_gets_a_connection_of_its_own(
    there: Attacked, header: str
) -> None:
    """Port and instance are in the server name, so the gateway may lead elsewhere by it."""
    app_id, instance = new_app_id(), new_app_id()
    bad = impostor_chain(there.kms, Kind.NO_APP_ID, app_id, OTHER)
    with there.impostor(there.kms.issue(app_id)) as real, there.impostor(bad) as impostor:
        there.route(app_id, real)
        await there.make_pooled(app_id, real)
        there.mesh.world.gateway.remove_route(app_id)
        there.route(app_id, impostor)
        there.route(instance, impostor)
        value = "1234" if header == "x-dstack-target-port" else instance
        answer = await there.mesh.call("a", app_id, headers=[(header, value)])
        problem(answer, "peer_untrusted", 502)
        await all_over(impostor)
        assert (real.handshakes, impostor.handshakes) == (1, 1)
        assert impostor.application_bytes == 0
        assert (await there.mesh.call("a", app_id)).status == 200
        assert (real.handshakes, impostor.handshakes) == (1, 1), "the first one is there still"


async def test_a_renewed_identity_makes_new_connections(there: Attacked) -> None:
    app_id = new_app_id()
    with Impostor(there.kms.issue(app_id), answer=slow_at_busy) as real:
        there.route(app_id, real)
        await there.make_pooled(app_id, real)
        await renew(there)
        await eventually(lambda: real.handshakes == 2 and there.pooled(app_id) == 1)
        assert (await there.mesh.call("a", app_id)).status == 200
        assert real.handshakes == 2


async def test_a_connection_in_use_during_a_renewal_is_not_used_again(there: Attacked) -> None:
    app_id = new_app_id()

    def answer(received: bytes) -> bytes | None:
        return None if b"/busy" in received and b"now" not in received else any_answer(received)

    with Impostor(there.kms.issue(app_id), answer=answer) as real:
        there.route(app_id, real)
        await there.make_pooled(app_id, real)
        async with Client.connect(there.mesh.outbound("a")) as client:
            fields = [("x-dstack-target-app", app_id), ("content-length", "3")]
            await client.send(request("POST", "/busy", fields))
            await eventually(lambda: b"/busy" in real.received)
            await renew(there)
            assert there.pooled(app_id) == 1, "what is in flight goes on"
            await client.send(b"now")
            assert (await client.answer("POST")).body == b"ok"
            await eventually(lambda: real.handshakes == 2)  # another one is kept ready
        assert (await there.mesh.call("a", app_id)).status == 200
        assert real.handshakes == 2


async def renew(there: Attacked) -> None:
    """Renew the caller's identity now rather than in 16 hours."""
    identity = there.sidecar.identity
    before = identity.current
    assert before is not None
    assert await identity._fetch() is None
    assert identity.current is not None
    assert identity.current.generation == before.generation + 1


async def test_a_pooled_connection_ends_with_the_targets_certificate(there: Attacked) -> None:
    app_id = new_app_id()
    expiry = int(time.time()) + 2
    with there.impostor(there.kms.issue(app_id, not_after=expiry)) as target:
        there.route(app_id, target)
        await there.make_pooled(app_id, target)
        received = target.received
        await eventually(lambda: time.time() > expiry)
        problem(await there.mesh.call("a", app_id, path="/secret"), "peer_untrusted", 502)
        await all_over(target)
        assert target.received == received

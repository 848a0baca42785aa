"""Targets that answer what was not asked, and some that hang up before anything was."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from dstack_mesh.model import AppId
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.odd import Kind, impostor_chain
from tests.integration.harness import Wire, eventually, origin, problem
from tests.integration.tls_peers import Attacked, all_over, any_answer, attacked, new_app_id

pytestmark = pytest.mark.asyncio(loop_scope="module")

OTHER = AppId("bb" * 20)
FORGED = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Attacked]:
    async with attacked(tmp_path_factory.mktemp("world"), "1.3") as one:
        yield one


class Hasty(Impostor):
    """Answers before it was asked anything."""

    def _receive(self, tls: ssl.SSLSocket) -> None:
        tls.sendall(FORGED)
        super()._receive(tls)


@pytest.mark.parametrize("attempt", range(5))
async def test_an_answer_that_nobody_asked_for_is_not_taken_for_one(
    there: Attacked, attempt: int
) -> None:
    app_id = new_app_id()
    chain = impostor_chain(there.kms, Kind.OTHER_APP, app_id, OTHER)
    with Hasty(chain) as impostor:
        there.route(app_id, impostor)
        problem(await there.mesh.call("a", app_id), "peer_app_id_mismatch", 502)
        await all_over(impostor)
        assert impostor.application_bytes == 0


@pytest.mark.parametrize("clean", [True, False])
async def test_a_target_that_hangs_up_with_its_handshake(tmp_path: Path, clean: bool) -> None:
    """The end comes along with the last flight, before the mesh had a chance to ask anything."""
    app_id = new_app_id()
    async with (
        attacked(tmp_path, "1.2") as there,
        origin(hang_up(there, app_id, clean)) as (target, address),
    ):
        there.mesh.world.gateway.add_route(app_id, address.host, address.port)
        async with asyncio.timeout(5):
            problem(await there.mesh.call("a", app_id), "upstream_closed", 502)
        await eventually(lambda: there.pooled(app_id) == 0)
        assert len(target.wires) == 1


def hang_up(there: Attacked, app_id: AppId, clean: bool) -> Callable[[Wire], Awaitable[None]]:
    """Serve TLS 1.2, where the server ends the handshake, and end the connection in one go."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    there.kms.issue(app_id).load_into(context)

    async def serve(wire: Wire) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            incoming.write(await wire.read())
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                await wire.send(outgoing.read())
            else:
                break
        if clean:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()
        await wire.send(outgoing.read())
        wire.finish()

    return serve


async def test_an_answer_pushed_into_the_pool_is_given_to_nobody(there: Attacked) -> None:
    app_id = new_app_id()
    with Impostor(
        there.kms.issue(app_id), answer=lambda received: (any_answer(received) or b"") + FORGED
    ) as target:
        there.route(app_id, target)
        for _ in range(3):
            assert (await there.mesh.call("a", app_id)).body == b"ok"
            await eventually(lambda: there.pooled(app_id) == 0)
        assert target.handshakes == 3


async def test_an_answer_pushed_later_ends_the_idle_connection(there: Attacked) -> None:
    app_id = new_app_id()
    push = asyncio.Event()

    async def serve(wire: Wire) -> None:
        while head := await wire.head():
            await wire.send(any_answer(head) or b"")
            await push.wait()
            await wire.send(FORGED)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.kms.issue(app_id).load_into(context)
    async with origin(serve, tls=context) as (target, address):
        there.mesh.world.gateway.add_route(app_id, address.host, address.port)
        for _ in range(3):
            push.clear()
            assert (await there.mesh.call("a", app_id)).body == b"ok"
            assert there.pooled(app_id) == 1
            push.set()
            await eventually(lambda: there.pooled(app_id) == 0)
        assert len(target.wires) == 3

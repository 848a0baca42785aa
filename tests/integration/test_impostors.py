"""Impostors at the target's address: not one byte of a request reaches any of them.

They complete real handshakes and count what OpenSSL decrypts; the count is taken when the mesh has
ended the connection, so nothing can come later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from enum import StrEnum

import pytest
import pytest_asyncio

from dstack_mesh.model import AppId
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.odd import WRONG_TARGETS, Kind, impostor_chain
from tests.integration.harness import Answer, Client, eventually, problem, request
from tests.integration.tls_peers import Attacked, all_over, attacked, new_app_id, real_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

OTHER = AppId("bb" * 20)
SECRET = ("authorization", "Bearer secret")


class Shape(StrEnum):
    """What the client sends before it has an answer."""

    GET = "get"
    POST = "post"
    CHUNKED = "chunked"
    UPGRADE = "upgrade"


def first_part(shape: Shape, app_id: AppId) -> bytes:
    """The head, and of a body or of the other protocol a part."""
    fields = [("x-dstack-target-app", app_id), SECRET]
    if shape is Shape.GET:
        return request("GET", "/secret", fields)
    if shape is Shape.POST:
        return request("POST", "/secret", [*fields, ("content-length", "20")]) + b"secret-one"
    if shape is Shape.CHUNKED:
        fields.append(("transfer-encoding", "chunked"))
        return request("POST", "/secret", fields) + b"a\r\nsecret-one\r\n"
    fields += [("connection", "upgrade"), ("upgrade", "echo")]
    return request("GET", "/secret", fields) + b"secret-one"


REST = {
    Shape.GET: b"",
    Shape.POST: b"secret-two",
    Shape.CHUNKED: b"a\r\nsecret-two\r\n0\r\n\r\n",
    Shape.UPGRADE: b"secret-two",
}


class Before(StrEnum):
    """What was at the address before the impostor."""

    FRESH = "fresh"
    """Nothing that the mesh knows of."""
    POOLED = "pooled"
    """The real target, to which a connection was pooled; then its connections ended."""
    RENEWED = "renewed"
    """The same, the impostor has the keys of the TLS sessions too, and we have renewed since."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["1.3", "1.2"])
async def there(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Attacked]:
    async with attacked(tmp_path_factory.mktemp("world"), request.param) as one:
        yield one


async def put_up(there: Attacked, app_id: AppId, before: Before, chain: Issued) -> Impostor:
    """Have an impostor that shows `chain` where the gateway finds the app."""
    if before is Before.FRESH:
        impostor = there.impostor(chain)
        there.route(app_id, impostor)
        return impostor
    real = there.impostor(real_chain(there.kms, app_id, chain))
    try:
        there.route(app_id, real)
        await there.make_pooled(app_id, real)
        if before is Before.RENEWED:
            real.show(chain)
            real.drop_connections()
            await all_over(real)
            assert await there.sidecar.identity._fetch() is None
    except BaseException:
        real.close()
        raise
    if before is Before.POOLED:
        await asyncio.to_thread(real.close)
        real = there.impostor(chain, port=real.address.port)
    await eventually(lambda: there.pooled(app_id) == 0)
    return real


@pytest.mark.parametrize("before", Before)
@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("kind", WRONG_TARGETS)
async def test_nothing_reaches_an_impostor(
    there: Attacked, kind: Kind, shape: Shape, before: Before
) -> None:
    app_id = new_app_id()
    chain = impostor_chain(there.kms, kind, app_id, OTHER)
    with await put_up(there, app_id, before, chain) as impostor:
        connections, received = impostor.connections, impostor.received
        async with Client.connect(there.mesh.outbound("a")) as client:
            await client.send(first_part(shape, app_id))
            assert_refused(await client.answer(), kind)
            await all_over(impostor)
            assert impostor.connections == connections + 1, "one attempt, no second one"
            await go_on(there, client, shape)
        assert impostor.connections == connections + 1
        assert impostor.resumed == 0
        assert impostor.application_bytes == len(received)
        assert impostor.received == received
    assert there.pooled(app_id) == 0
    assert there.pooled(OTHER) == 0


def assert_refused(answer: Answer, kind: Kind) -> None:
    if kind is Kind.OTHER_APP:
        detail = problem(answer, "peer_app_id_mismatch", 502)["detail"]
        assert OTHER in str(detail)
    else:
        problem(answer, "peer_untrusted", 502)


async def go_on(there: Attacked, client: Client, shape: Shape) -> None:
    """Send what is left, and show that a good target is reached again."""
    await client.send(REST[shape])
    if shape is Shape.GET:
        fields = [("x-dstack-target-app", there.mesh.app_id("b"))]
        await client.send(request("GET", "/", fields))
        assert (await client.answer()).body == b"hello\n"
    else:
        if shape is not Shape.UPGRADE:  # without a body its connection stays open
            assert await client.closed() == b"", "nothing but the refusal"
        assert (await there.mesh.call("a", "b")).body == b"hello\n"


@pytest.mark.parametrize("before", Before)
@pytest.mark.parametrize("shape", Shape)
async def test_the_right_target_does_get_the_bytes(
    there: Attacked, shape: Shape, before: Before
) -> None:
    """The control: the counting sees what is sent once the chain is good."""
    app_id = new_app_id()
    with await put_up(there, app_id, before, there.kms.issue(app_id)) as target:
        seen = len(target.received)
        async with Client.connect(there.mesh.outbound("a")) as client:
            await client.send(first_part(shape, app_id))
            assert (await client.answer()).body == b"ok"
        received = target.received[seen:]
        assert received.split(b" ")[1] == b"/secret"
        assert b"Bearer secret" in received
        if shape in (Shape.POST, Shape.CHUNKED):
            await eventually(lambda: b"secret-one" in target.received)
        assert target.application_bytes == len(target.received)
        assert target.resumed == 0

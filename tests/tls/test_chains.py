"""Chains that are long, looping, doubled, huge, mixed up or made by somebody else, in both roles.

The contract: other certificates that a peer sends do not matter unless they keep the chain from
being built, which is a refusal; and identity rests on the verified chain alone. So each of these
is either the app whose CA signed the leaf, or nobody.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import dsa, ec

from dstack_mesh.model import AppId
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.kms import APP_CA_NAME
from tests.integration.harness import Mesh, mesh, problem
from tests.integration.tls_peers import (
    VERSIONS,
    all_over,
    any_answer,
    call_inbound,
    caller_context,
    new_app_id,
)
from tests.tls import der as by_hand
from tests.tls import records as tls
from tests.tls.chains import BAD, GOOD, Mint, by_sha_1
from tests.tls.records import SocketChannel
from tests.tls.scene import ASK, OTHER, Calling, Listening
from tests.tls.tls13 import AlertReceived, Client, Ended, Server, Shown

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with mesh(tmp_path_factory.mktemp("world")) as found:
        await found.start("a", backend=False, MESH_TLS_MIN_VERSION="1.2")
        await found.start("b", MESH_TLS_MIN_VERSION="1.2")
        yield found
        assert (await found.call("a", "b")).body == b"hello\n", "good ones are served after it all"


def target(one: Mesh, app_id: AppId, issued: Issued, version: str) -> Impostor:
    limits = VERSIONS[version]
    impostor = Impostor(issued, min_version=limits, max_version=limits, answer=any_answer)
    one.world.gateway.add_route(app_id, impostor.address.host, impostor.address.port)
    return impostor


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", GOOD)
async def test_a_target_with_more_around_it_is_who_it_is(
    one: Mesh, name: str, version: str
) -> None:
    app_id = new_app_id()
    issued = GOOD[name](Mint(one.world.kms, app_id))
    with target(one, app_id, issued, version) as there:
        assert (await one.call("a", app_id)).body == b"ok"
        assert there.application_bytes
    other = new_app_id()
    with target(one, other, issued, version) as there:
        problem(await one.call("a", other), "peer_app_id_mismatch", 502)
        await all_over(there)
        assert there.application_bytes == 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BAD)
async def test_a_target_that_is_nobody_gets_nothing(one: Mesh, name: str, version: str) -> None:
    app_id = new_app_id()
    issued = BAD[name](Mint(one.world.kms, app_id))
    with target(one, app_id, issued, version) as there:
        answer = await one.call("a", app_id, "POST", "/secret", body=b"secret")
        assert answer.error in ("peer_untrusted", "tls_failed"), answer
        assert (answer.error == "tls_failed") <= (name in ("too_large", "too_many", "200 links"))
        await all_over(there)
        assert there.connections == 1
        assert there.application_bytes == 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", GOOD)
async def test_a_caller_with_more_around_it_is_who_it_is(
    one: Mesh, name: str, version: str
) -> None:
    app_id = new_app_id()
    issued = GOOD[name](Mint(one.world.kms, app_id))
    context = caller_context(one.world.kms.root_pem, issued, VERSIONS[version])
    assert (await call_inbound(one.inbound("b"), context)).body == b"hello\n"
    assert one.backends["b"].requests[-1].header("x-dstack-app-id") == app_id


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BAD)
async def test_a_caller_that_is_nobody_reaches_nothing(one: Mesh, name: str, version: str) -> None:
    issued = BAD[name](Mint(one.world.kms, new_app_id()))
    context = caller_context(one.world.kms.root_pem, issued, VERSIONS[version])
    backend = one.backends["b"]
    before = backend.connections, len(backend.requests)
    try:
        answer = await call_inbound(one.inbound("b"), context)
    except OSError:  # an alert, or the end of the connection before it could be read
        pass
    else:
        problem(answer, "client_cert_untrusted", 401)
    assert (backend.connections, len(backend.requests)) == before


# Keys of kinds that the hand-made peers show: OpenSSL's own tools would not load them.


async def test_a_leaf_with_a_dsa_key_is_nobody(one: Mesh) -> None:
    """Our TLS 1.2 server names DSA among what it can verify; the chain rules do not take it."""
    mint = Mint(one.world.kms, new_app_id())
    ca_key, ca = one.world.kms.app_ca(mint.app_id)
    key = dsa.generate_private_key(2048)
    leaf = certs.build(
        certs.leaf_name("localhost"),
        APP_CA_NAME,
        key,  # type: ignore[arg-type]  # any key that has a public one will do
        ca_key,
        mint.leaf_extensions(),
        not_after=certs.in_ten_years(),
    )
    issued = Issued(
        certs.key_pem(key),  # type: ignore[arg-type]
        (certs.certificate_pem(leaf), certs.certificate_pem(ca), one.world.kms.root_pem),
    )
    context = caller_context(one.world.kms.root_pem, issued, VERSIONS["1.2"])
    before = len(one.backends["b"].requests)
    problem(await call_inbound(one.inbound("b"), context), "client_cert_untrusted", 401)
    assert len(one.backends["b"].requests) == before


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("link", ["leaf", "app CA"])
async def test_a_chain_with_sha_1_in_it_is_nobody(one: Mesh, link: str, version: str) -> None:
    app_id = new_app_id()
    issued = by_sha_1(Mint(one.world.kms, app_id), link)
    with target(one, app_id, issued, version) as there:
        problem(await one.call("a", app_id), "peer_untrusted", 502)
        await all_over(there)
        assert there.application_bytes == 0
    before = len(one.backends["b"].requests)
    context = caller_context(one.world.kms.root_pem, issued, VERSIONS[version])
    with pytest.raises(OSError):
        await call_inbound(one.inbound("b"), context)
    assert len(one.backends["b"].requests) == before


async def test_a_leaf_on_a_weak_curve_is_nobody(one: Mesh) -> None:
    app_id = new_app_id()
    issued = Mint(one.world.kms, app_id).good(key=ec.generate_private_key(ec.SECP192R1()))
    for version in VERSIONS:
        with target(one, app_id, issued, version) as there:
            answer = await one.call("a", app_id)
            assert answer.error in ("peer_untrusted", "tls_failed")
            await all_over(there)
            assert there.application_bytes == 0
        one.world.gateway.remove_route(app_id)


async def test_changed_app_ids_over_real_sockets(one: Mesh) -> None:
    """A sample of `test_mutations.py`: the app-id of a leaf changed and signed again by its CA."""
    there = Listening(one)
    for at in range(20):
        good = Shown.of(one.world.kms.issue(OTHER))
        tbs = by_hand.tbs_of(good.certificates[0])
        changed = bytearray(bytes.fromhex(OTHER))
        changed[at] ^= 1 << at % 8
        tbs = tbs.replace(bytes.fromhex(OTHER), bytes(changed))
        leaf = by_hand.sign(tbs, one.world.kms.app_ca(OTHER)[0])
        shown = Shown((leaf, *good.certificates[1:]), good.key)

        def call(channel: SocketChannel, shown: Shown = shown) -> bytes:
            client = Client(channel)
            client.handshake(shown)
            return client.ask(ASK)

        assert await there.attack(call) == b"HTTP/1.1 401 Unauthorized"


async def test_a_certificate_with_bytes_behind_it_is_nobody(one: Mesh) -> None:
    """Two parsers could take it for two different ones; both roles, over real sockets."""
    app_id = new_app_id()
    good = Shown.of(one.world.kms.issue(app_id))
    shown = Shown((good.certificates[0] + b"\5\0", *good.certificates[1:]), good.key)

    def call(channel: SocketChannel) -> bytes:
        client = Client(channel)
        client.hello()
        client.read_flight()
        client.show(shown)
        client.send(tls.APPLICATION_DATA, ASK)
        client.read_to_end()
        return client.application_data

    assert await Listening(one).attack(call) == b""

    def serve(channel: SocketChannel) -> None:
        server = Server(channel)
        server.read_client_hello()
        server.agree()
        server.show(server.flight(shown))
        try:
            while True:
                kind, _ = server.read_record()
                assert kind != tls.APPLICATION_DATA
        except (AlertReceived, Ended):
            pass

    answer = await Calling(one).ask(serve, app_id)
    assert answer.error in ("tls_failed", "peer_untrusted")

"""Every certificate of `tests/vectors/certs`, shown over real TLS by whoever has its key.

The sidecar's identity is a vector's as well, from files, so that the vectors' KMS is its own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_mesh.model import AppId
from tests.integration.harness import Mesh, mesh, problem
from tests.tls import records as tls
from tests.tls.records import SocketChannel
from tests.tls.scene import ASK, Calling, Listening
from tests.tls.tls13 import AlertReceived, Client, Ended, Server, Shown

pytestmark = pytest.mark.asyncio(loop_scope="module")

CERTS = Path(__file__).parent.parent / "vectors" / "certs"
VECTORS: dict[str, dict[str, Any]] = {
    vector["name"]: vector for vector in json.loads((CERTS / "index.json").read_text())["vectors"]
}
APP_A = AppId("aa" * 20)
GOOD_FOR = {
    "caller": {
        name
        for name, vector in VECTORS.items()
        if vector["trust_under_kms1"] == "ok" and name != "leaf-a-serveronly"
    },
    "target": {
        name
        for name, vector in VECTORS.items()
        if vector["trust_under_kms1"] == "ok" and name != "leaf-a-clientonly"
    },
}


def shown(name: str) -> Shown:
    pem = (CERTS / VECTORS[name]["chain"]).read_bytes()
    chain = [
        cert.public_bytes(serialization.Encoding.DER)
        for cert in x509.load_pem_x509_certificates(pem)
    ]
    key = serialization.load_pem_private_key((CERTS / VECTORS[name]["key"]).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Shown(tuple(chain), key)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    identity = {
        "MESH_CERT_FILE": str(CERTS / "leaf-b.chain.pem"),
        "MESH_KEY_FILE": str(CERTS / "leaf-b.key"),
        "MESH_CA_FILE": str(CERTS / "kms1-root.pem"),
    }
    async with mesh(tmp_path_factory.mktemp("world")) as found:
        await found.start("a", backend=False, **identity)
        await found.start("b", backend=True, **identity)
        yield found


async def test_there_are_good_ones_and_bad_ones() -> None:
    assert len(VECTORS) > 30
    for names in GOOD_FOR.values():
        assert 5 < len(names) < len(VECTORS) - 15


@pytest.mark.parametrize("name", VECTORS)
async def test_a_vector_as_a_caller(one: Mesh, name: str) -> None:
    there = Listening(one)
    answers: list[bytes] = []

    def act(channel: SocketChannel) -> None:
        client = Client(channel)
        client.hello()
        client.read_flight()
        client.show(shown(name))
        try:
            answers.append(client.ask(ASK))
        except (AlertReceived, Ended):
            answers.append(b"")

    if name in GOOD_FOR["caller"]:
        with pytest.raises(AssertionError, match="something reached the backend"):
            await there.attack(act)
        said = one.backends["b"].requests[-1].header("x-dstack-app-id")
        assert said == VECTORS[name]["app_id"]
    else:
        await there.attack(act)
        assert answers[0] in (b"", b"HTTP/1.1 401 Unauthorized")


@pytest.mark.parametrize("name", VECTORS)
async def test_a_vector_as_a_target(one: Mesh, name: str) -> None:
    """Asked for as app A, and as the very app that it says it is."""
    said = VECTORS[name]["app_id"]
    for app_id in {APP_A, AppId(said) if said and len(said) == 40 else APP_A}:
        received: list[bytes] = []

        def serve(channel: SocketChannel, received: list[bytes] = received) -> None:
            server = Server(channel)
            server.read_client_hello()
            server.agree()
            server.show(server.flight(shown(name)))
            try:
                server.read_answer()
                server.read_until(lambda data: data.endswith(b"secret body"))
                server.send(
                    tls.APPLICATION_DATA,
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
                )
                server.send(tls.ALERT, b"\1\0")
            except (AlertReceived, Ended):
                pass
            finally:
                received.append(server.application_data)

        answer = await Calling(one).ask(serve, app_id)
        if name in GOOD_FOR["target"] and said == app_id:
            assert answer.body == b"ok"
        else:
            assert answer.error in ("peer_untrusted", "peer_app_id_mismatch", "tls_failed")
            problem(answer, answer.error, 502)
            assert received == [b""]

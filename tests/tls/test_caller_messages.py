"""A caller's certificate and its proof, wrong in every way that a message can be.

With TLS 1.3 and 1.2, written by hand. None of these callers is served anything that needs an
identity, and each is told by an alert (which arrives under the handshake's keys, so it is read).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.tls import records as tls
from tests.tls import tls12, tls13
from tests.tls.records import SocketChannel
from tests.tls.scene import ASK, CALLER, Listening, listening, resident
from tests.tls.tls13 import AlertReceived, Ended, Shown

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Listening]:
    async with listening(tmp_path_factory.mktemp("b"), "1.2") as one:
        yield one


def key_of(shown: Shown) -> ec.EllipticCurvePrivateKey:
    assert shown.key is not None
    return shown.key


def signed(client: tls13.Client, shown: Shown, certificate: bytes) -> bytes:
    return certificate + client.verify(key_of(shown), certificate)


def entries(*ders: bytes) -> bytes:
    return b"".join(tls.vector(3, der) + tls.vector(2, b"") for der in ders)


def certificate_of(body: bytes) -> bytes:
    return tls.message(tls.CERTIFICATE, body)


Make = Callable[[tls13.Client, Shown], bytes]


def no_proof(client: tls13.Client, shown: Shown) -> bytes:
    return client.certificate(shown.certificates)


def other_key(client: tls13.Client, shown: Shown) -> bytes:
    certificate = client.certificate(shown.certificates)
    return certificate + client.verify(ec.generate_private_key(ec.SECP256R1()), certificate)


def other_handshake(client: tls13.Client, shown: Shown) -> bytes:
    certificate = client.certificate(shown.certificates)
    return certificate + client.verify(key_of(shown), os.urandom(32))


def other_role(client: tls13.Client, shown: Shown) -> bytes:
    certificate = client.certificate(shown.certificates)
    return certificate + client.verify(key_of(shown), certificate, context=tls13.Server.own_context)


def weak_hash(client: tls13.Client, shown: Shown) -> bytes:
    certificate = client.certificate(shown.certificates)
    return certificate + client.verify(
        key_of(shown), certificate, scheme=0x0203, digest=hashes.SHA1()
    )


def other_scheme(client: tls13.Client, shown: Shown) -> bytes:
    certificate = client.certificate(shown.certificates)
    return certificate + client.verify(key_of(shown), certificate, scheme=0x0804)


def empty_signature(client: tls13.Client, shown: Shown) -> bytes:
    body = tls.u16s(tls.ECDSA_P256_SHA256) + tls.vector(2, b"")
    return no_proof(client, shown) + tls.message(tls.CERTIFICATE_VERIFY, body)


def null_signature(client: tls13.Client, shown: Shown) -> bytes:
    """r and s of zero."""
    body = tls.u16s(tls.ECDSA_P256_SHA256) + tls.vector(2, bytes.fromhex("3006020100020100"))
    return no_proof(client, shown) + tls.message(tls.CERTIFICATE_VERIFY, body)


def huge_signature(client: tls13.Client, shown: Shown) -> bytes:
    body = tls.u16s(tls.ECDSA_P256_SHA256) + tls.vector(2, bytes(60_000))
    return no_proof(client, shown) + tls.message(tls.CERTIFICATE_VERIFY, body)


def proof_alone(client: tls13.Client, shown: Shown) -> bytes:
    return client.verify(key_of(shown), b"")


def proof_without_certificate(client: tls13.Client, shown: Shown) -> bytes:
    certificate = client.certificate(())
    return certificate + client.verify(key_of(shown), certificate)


def proof_first(client: tls13.Client, shown: Shown) -> bytes:
    return client.verify(key_of(shown), b"") + client.certificate(shown.certificates)


def proof_twice(client: tls13.Client, shown: Shown) -> bytes:
    once = signed(client, shown, client.certificate(shown.certificates))
    return once + client.verify(key_of(shown), once)


def certificate_twice(client: tls13.Client, shown: Shown) -> bytes:
    return signed(client, shown, 2 * client.certificate(shown.certificates))


def wrong_context(client: tls13.Client, shown: Shown) -> bytes:
    return signed(client, shown, client.certificate(shown.certificates, b"made up"))


def of_body(body: Callable[[Shown], bytes]) -> Make:
    return lambda client, shown: signed(client, shown, certificate_of(body(shown)))


WRONG: dict[str, Make] = {
    "no proof": no_proof,
    "another key": other_key,
    "another handshake": other_handshake,
    "another role": other_role,
    "SHA-1": weak_hash,
    "another scheme": other_scheme,
    "empty signature": empty_signature,
    "null signature": null_signature,
    "huge signature": huge_signature,
    "proof alone": proof_alone,
    "proof without certificate": proof_without_certificate,
    "proof first": proof_first,
    "proof twice": proof_twice,
    "certificate twice": certificate_twice,
    "context that was not given": wrong_context,
    "nothing in the message": of_body(lambda shown: b""),
    "half a length": of_body(lambda shown: b"\0\0"),
    "list longer than the message": of_body(
        lambda shown: b"\0" + (9999).to_bytes(3) + entries(*shown.certificates)
    ),
    "list shorter than the message": of_body(
        lambda shown: b"\0" + (4).to_bytes(3) + entries(*shown.certificates)
    ),
    "bytes behind the list": of_body(
        lambda shown: b"\0" + tls.vector(3, entries(*shown.certificates)) + b"\0"
    ),
    "an empty certificate": of_body(lambda shown: b"\0" + tls.vector(3, entries(b""))),
    "an empty certificate behind a good one": of_body(
        lambda shown: b"\0" + tls.vector(3, entries(*shown.certificates, b""))
    ),
    "a certificate that is none": of_body(
        lambda shown: b"\0" + tls.vector(3, entries(os.urandom(500)))
    ),
    "a certificate that is none behind a good one": of_body(
        lambda shown: b"\0" + tls.vector(3, entries(*shown.certificates, b"0\0"))
    ),
    "a certificate with bytes behind it": of_body(
        lambda shown: b"\0" + tls.vector(3, entries(shown.certificates[0] + b"\0"))
    ),
    "a certificate cut short": of_body(
        lambda shown: b"\0" + tls.vector(3, entries(shown.certificates[0][:-1]))
    ),
    "extensions that lie": of_body(
        lambda shown: b"\0" + tls.vector(3, tls.vector(3, shown.certificates[0]) + b"\xff\xff")
    ),
    "an extension nobody asked for": of_body(
        lambda shown: (
            b"\0"
            + tls.vector(
                3,
                tls.vector(3, shown.certificates[0]) + tls.vector(2, tls.extension(5, b"\1\0\0\0")),
            )
        )
    ),
    "over 100 KB of good certificates": of_body(
        lambda shown: b"\0" + tls.vector(3, entries(*shown.certificates * 100))
    ),
    "1 MB": of_body(lambda shown: b"\0" + tls.vector(3, entries(bytes(1_000_000)))),
    "16 MB": of_body(lambda shown: b"\0" + tls.vector(3, entries(bytes(0xFFFF00)))),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_certificate_or_proof(there: Listening, name: str) -> None:
    """Finished is right in each, so that nothing else is why it is refused."""

    def act(channel: SocketChannel) -> int | None:
        client = tls13.Client(channel)
        client.hello()
        client.read_flight()
        assert client.asked_for_certificate
        said = WRONG[name](client, there.good())
        client.say(said + client.finished(said))
        client.switch()
        client.send(tls.APPLICATION_DATA, ASK)
        alert = client.read_to_end()
        assert client.application_data == b""
        return alert

    assert await there.attack(act) in (10, 22, 42, 47, 50, 51, 110), name


async def test_the_control(there: Listening) -> None:
    """The same, all right: the backend is asked."""
    answers: list[bytes] = []

    def act(channel: SocketChannel) -> None:
        client = tls13.Client(channel)
        client.hello()
        client.read_flight()
        said = signed(client, shown := there.good(), client.certificate(shown.certificates))
        client.say(said + client.finished(said))
        client.switch()
        answers.append(client.ask(ASK))

    with pytest.raises(AssertionError, match="something reached the backend"):
        await there.attack(act)
    assert answers == [b"HTTP/1.1 404 Not Found"]


@pytest.mark.parametrize("change", ["wrong", "short", "long", "missing", "twice"])
@pytest.mark.parametrize("shown", [True, False], ids=["with a certificate", "without"])
async def test_a_wrong_finished(there: Listening, change: str, shown: bool) -> None:
    def act(channel: SocketChannel) -> tuple[int | None, bytes]:
        client = tls13.Client(channel)
        client.hello()
        client.read_flight()
        good = there.good()
        said = client.certificate(good.certificates if shown else ())
        if shown:
            said = signed(client, good, said)
        finished = client.finished(said)
        wrong = {
            "wrong": finished[:-1] + bytes([finished[-1] ^ 1]),
            "short": tls.message(tls.FINISHED, finished[4:-1]),
            "long": tls.message(tls.FINISHED, finished[4:] + b"\0"),
            "missing": b"",
            "twice": finished + finished,
        }[change]
        client.say(said + wrong)
        client.switch()
        client.send(tls.APPLICATION_DATA, ASK)
        channel.finish()
        return client.read_to_end(), client.application_data

    alert, data = await there.attack(act)
    assert data == b""
    assert alert is not None or change == "twice"


async def test_a_request_before_the_proof_is_refused(there: Listening) -> None:
    """Data under the handshake's keys, and data under the application's before Finished."""

    def under_handshake_keys(channel: SocketChannel) -> int | None:
        client = tls13.Client(channel)
        client.hello()
        client.read_flight()
        client.send(tls.APPLICATION_DATA, ASK)
        return client.read_to_end()

    def too_early(channel: SocketChannel) -> int | None:
        client = tls13.Client(channel)
        client.hello()
        client.read_flight()
        client.switch()
        client.send(tls.APPLICATION_DATA, ASK)
        return client.read_to_end()

    assert await there.attack(under_handshake_keys) == 10
    assert await there.attack(too_early) == 20


async def test_without_a_certificate_there_is_no_more_than_health(there: Listening) -> None:
    def act(channel: SocketChannel) -> bytes:
        client = tls13.Client(channel)
        client.handshake(None)
        return client.ask(ASK)

    assert await there.attack(act) == b"HTTP/1.1 401 Unauthorized"


async def test_large_certificate_messages_cost_no_memory(there: Listening) -> None:
    def act(channel: SocketChannel) -> None:
        client = tls13.Client(channel)
        client.hello()
        client.read_flight()
        client.say(WRONG["1 MB"](client, good))
        client.read_to_end()

    good = there.good()
    for _ in range(3):
        await there.attack(act)
    before = resident()
    for _ in range(30):
        await there.attack(act)
    assert resident() - before < 8 * MIB


# TLS 1.2.


def nothing_more(client: tls12.Client) -> int | None:
    """Send what a good caller would after its proof, and read to the end."""
    alert = None
    try:
        client.change_cipher_spec()
        client.say(client.finished(b"client finished"))
        client.send(tls.APPLICATION_DATA, ASK)
        while True:
            client.read_record()
    except AlertReceived as received:
        alert = received.code
    except Ended:
        pass
    assert client.application_data == b""
    return alert


Say = Callable[[tls12.Client, Shown], None]


def without_proof(client: tls12.Client, shown: Shown) -> None:
    client.say(client.certificate(shown.certificates), client.key_exchange())


def proof_by_other_key(client: tls12.Client, shown: Shown) -> None:
    without_proof(client, shown)
    client.say(client.verify(ec.generate_private_key(ec.SECP256R1())))


def proof_by_sha_1(client: tls12.Client, shown: Shown) -> None:
    without_proof(client, shown)
    client.say(client.verify(key_of(shown), 0x0203))


def proof_of_other_handshake(client: tls12.Client, shown: Shown) -> None:
    without_proof(client, shown)
    kept, client.transcript = client.transcript, os.urandom(100)
    proof = client.verify(key_of(shown))
    client.transcript = kept
    client.say(proof)


def no_key_exchange(client: tls12.Client, shown: Shown) -> None:
    client.say(client.certificate(shown.certificates))
    client.say(client.verify(key_of(shown)))


def no_certificate_message(client: tls12.Client, shown: Shown) -> None:
    client.say(client.key_exchange())


def weak_share(client: tls12.Client, shown: Shown) -> None:
    client.say(client.certificate(shown.certificates))
    client.say(tls.message(tls.CLIENT_KEY_EXCHANGE, tls.vector(1, bytes(32))))


def short_share(client: tls12.Client, shown: Shown) -> None:
    client.say(client.certificate(shown.certificates))
    client.say(tls.message(tls.CLIENT_KEY_EXCHANGE, tls.vector(1, client.share[:-1])))


def certificates_of(body: Callable[[Shown], bytes]) -> Say:
    return lambda client, shown: client.say(certificate_of(body(shown)), client.key_exchange())


WRONG_1_2: dict[str, Say] = {
    "no proof": without_proof,
    "another key": proof_by_other_key,
    "SHA-1": proof_by_sha_1,
    "another handshake": proof_of_other_handshake,
    "no key exchange": no_key_exchange,
    "no certificate message": no_certificate_message,
    "share of zeros": weak_share,
    "share too short": short_share,
    "nothing in the message": certificates_of(lambda shown: b""),
    "list longer than the message": certificates_of(
        lambda shown: (9999).to_bytes(3) + tls.vector(3, shown.certificates[0])
    ),
    "an empty certificate": certificates_of(lambda shown: tls.vector(3, tls.vector(3, b""))),
    "a certificate that is none": certificates_of(
        lambda shown: tls.vector(3, tls.vector(3, os.urandom(300)))
    ),
    "bytes behind a certificate": certificates_of(
        lambda shown: tls.vector(3, tls.vector(3, shown.certificates[0] + b"\0"))
    ),
    "1 MB": certificates_of(lambda shown: tls.vector(3, tls.vector(3, bytes(1_000_000)))),
}


@pytest.mark.parametrize("name", WRONG_1_2)
async def test_a_wrong_certificate_or_proof_with_1_2(there: Listening, name: str) -> None:
    def act(channel: SocketChannel) -> int | None:
        client = tls12.Client(channel)
        client.hello()
        client.read_flight()
        WRONG_1_2[name](client, there.good())
        return nothing_more(client)

    # The alert of a handshake that goes wrong can be lost to a reset; the end cannot.
    assert await there.attack(act) in (None, 10, 20, 22, 40, 42, 47, 50, 51), name


async def test_someone_elses_certificate_is_no_identity_even_in_a_good_chain(
    there: Listening,
) -> None:
    """What another caller showed can be seen by any target: it is of no use without its key."""
    seen = Shown.of(there.kms.issue(CALLER))

    def act(channel: SocketChannel) -> int | None:
        client = tls13.Client(channel)
        client.hello()
        client.read_flight()
        thief = ec.generate_private_key(ec.SECP256R1())
        client.show(Shown(seen.certificates, thief))
        client.send(tls.APPLICATION_DATA, ASK)
        return client.read_to_end()

    assert await there.attack(act) == 51

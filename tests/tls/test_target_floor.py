"""What our client offers, and what it takes from a target: hand-made impostors, byte by byte.

Every impostor here is at the right address with the right certificate and its key (but for the
last ones), so that only what is tested can be why it is refused. It decrypts what arrives, and no
byte of application data ever does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_mesh.model import AppId
from tests.integration.harness import Answer, problem
from tests.integration.tls_peers import new_app_id
from tests.tls import records as tls
from tests.tls import tls12, tls13
from tests.tls.records import Hello, SocketChannel
from tests.tls.scene import Calling, calling
from tests.tls.tls13 import AlertReceived, Ended, Shown

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRONG_GROUPS = {0x0017, 0x0018, 0x0019, 0x001D, 0x001E, *range(0x0100, 0x0105)}
AEAD_1_2 = {0xC02B, 0xC02C, 0xCCA9, 0xC02F, 0xC030, 0xCCA8}
AEAD_1_3 = {0x1301, 0x1302, 0x1303}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def new(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Calling]:
    async with calling(tmp_path_factory.mktemp("new"), "1.3") as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def old(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Calling]:
    async with calling(tmp_path_factory.mktemp("old"), "1.2") as one:
        yield one


def good(there: Calling, app_id: AppId) -> Shown:
    return Shown.of(there.kms.issue(app_id))


async def hello_of(there: Calling) -> Hello:
    """Have the mesh connect, and give its ClientHello."""
    found: list[Hello] = []

    def take(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        server.read_client_hello()
        found.append(server.client_hello)

    problem(await there.ask(take, new_app_id()), "tls_failed", 502)
    return found[0]


# What is offered.


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_the_offer(new: Calling, old: Calling, version: str) -> None:
    there, versions = {
        "1.3": (new, [tls.TLS_1_3]),
        "1.2": (old, [tls.TLS_1_3, tls.TLS_1_2]),
    }[version]
    hello = await hello_of(there)
    extensions = tls.read_extensions(b"".join(hello.extensions))
    assert tls.Reader(tls.Reader(extensions[tls.VERSIONS]).vector(1)).numbers() == versions
    suites = set(hello.suites) - {tls12.SCSV}
    assert suites <= AEAD_1_3 | (AEAD_1_2 if version == "1.2" else set())
    assert suites & AEAD_1_3
    assert hello.compressions == b"\0"
    groups = tls.Reader(tls.Reader(extensions[tls.GROUPS]).vector(2)).numbers()
    assert set(groups) <= STRONG_GROUPS
    schemes = tls.Reader(tls.Reader(extensions[tls.SIGNATURES]).vector(2)).numbers()
    assert not [scheme for scheme in schemes if scheme >> 8 < 3], "neither MD5 nor SHA-1"


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_nothing_to_resume_and_no_other_protocol_is_offered(
    new: Calling, old: Calling, version: str
) -> None:
    there = new if version == "1.3" else old
    for _ in range(2):  # the second time there is a session that could be offered
        assert (await there.mesh.call("a", "b")).status == 200
        hello = await hello_of(there)
        extensions = tls.read_extensions(b"".join(hello.extensions))
        unwanted = {tls.SESSION_TICKET, tls.PRE_SHARED_KEY, tls.EARLY_DATA, tls.ALPN}
        assert not extensions.keys() & unwanted


# What a hostile ServerHello may choose.


def says(make: Callable[[tls13.Server], bytes]) -> Callable[[SocketChannel], None]:
    """Answer the ClientHello with these bytes; an alert comes back and nothing else."""

    def serve(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        server.read_client_hello()
        channel.send(make(server))
        channel.finish()
        expect_nothing_but_alerts(server)

    return serve


def expect_nothing_but_alerts(server: tls13.Server | tls12.Server) -> None:
    """Read to the end; more than alerts (and ChangeCipherSpec) fails the test."""
    while True:
        try:
            kind, content = server.read_record()
        except AlertReceived:
            continue
        except Ended:
            return
        assert kind == tls.CHANGE_CIPHER_SPEC, f"a record of kind {kind}: {content!r}"


def server_hello_12(server: tls13.Server, version: int, suite: int, compression: int = 0) -> bytes:
    by_hand = tls12.Server(server.channel)
    by_hand.server_random = bytes(range(32))
    return by_hand.hello(version=version, suite=suite, compression=compression)


OLD_VERSIONS = [tls.SSL_3, tls.TLS_1_0, tls.TLS_1_1]


@pytest.mark.parametrize("chosen", OLD_VERSIONS)
@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_versions_below_1_2_are_refused_always(
    new: Calling, old: Calling, version: str, chosen: int
) -> None:
    def make(server: tls13.Server) -> bytes:
        said = server_hello_12(server, chosen, 0x002F)
        return tls.record(tls.HANDSHAKE, said, chosen)

    answer = await (new if version == "1.3" else old).ask(says(make), new_app_id())
    assert "no TLS version in common" in str(problem(answer, "tls_failed", 502)["detail"])


async def test_tls_1_2_is_refused_by_default(new: Calling) -> None:
    def make(server: tls13.Server) -> bytes:
        return tls.record(tls.HANDSHAKE, server_hello_12(server, tls.TLS_1_2, 0xC02B))

    problem(await new.ask(says(make), new_app_id()), "tls_failed", 502)


@pytest.mark.parametrize(
    "suite",
    tls.numbers_of(
        "0000 0001 0003 0004 0005 000A 0018 0033 0034 002F 009C 00A8 C006 C007 C008 C009 C012"
        " C013 C023 C027 C0AC 1304"
    ),
)
async def test_a_suite_that_was_not_offered_is_refused(
    new: Calling, old: Calling, suite: int
) -> None:
    def of_1_2(server: tls13.Server) -> bytes:
        return tls.record(tls.HANDSHAKE, server_hello_12(server, tls.TLS_1_2, suite))

    def of_1_3(server: tls13.Server) -> bytes:
        return tls.record(tls.HANDSHAKE, server.server_hello(suite=suite))

    problem(await old.ask(says(of_1_2), new_app_id()), "tls_failed", 502)
    problem(await new.ask(says(of_1_3), new_app_id()), "tls_failed", 502)


async def test_compression_is_refused(new: Calling, old: Calling) -> None:
    def of_1_2(server: tls13.Server) -> bytes:
        return tls.record(tls.HANDSHAKE, server_hello_12(server, tls.TLS_1_2, 0xC02B, 1))

    def of_1_3(server: tls13.Server) -> bytes:
        return tls.record(tls.HANDSHAKE, server.server_hello(compression=1))

    problem(await old.ask(says(of_1_2), new_app_id()), "tls_failed", 502)
    problem(await new.ask(says(of_1_3), new_app_id()), "tls_failed", 502)


@pytest.mark.parametrize(
    "unasked",
    [
        tls.extension(tls.PRE_SHARED_KEY, b"\0\0"),
        tls.extension(tls.EARLY_DATA, b""),
        tls.extension(tls.ALPN, b"\0\3\2h2"),
        tls.extension(0x5A5A, b"x"),
        tls.extension(tls.VERSIONS, tls.u16s(tls.TLS_1_3)),
    ],
    ids=["psk", "early data", "alpn", "unknown", "twice"],
)
async def test_an_extension_that_was_not_asked_for_is_refused(new: Calling, unasked: bytes) -> None:
    def make(server: tls13.Server) -> bytes:
        return tls.record(tls.HANDSHAKE, server.server_hello(unasked))

    problem(await new.ask(says(make), new_app_id()), "tls_failed", 502)


async def test_a_retry_request_without_end_is_refused(new: Calling) -> None:
    """RFC 8446 4.1.4: a second HelloRetryRequest ends the handshake."""
    random = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
    rounds: list[int] = []

    def serve(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        try:
            while len(rounds) < 10:
                server.read_client_hello()
                rounds.append(1)
                extensions = tls.extension(tls.VERSIONS, tls.u16s(tls.TLS_1_3))
                extensions += tls.extension(tls.KEY_SHARE, tls.u16s(tls.SECP256R1))
                head = tls.u16s(tls.TLS_1_2) + random
                head += tls.vector(1, server.client_hello.session_id)
                body = head + tls.u16s(tls.AES_128_GCM_SHA256) + b"\0" + tls.vector(2, extensions)
                server.say(tls.message(tls.SERVER_HELLO, body))
        except (AlertReceived, Ended):
            return

    problem(await new.ask(serve, new_app_id()), "tls_failed", 502)
    assert len(rounds) == 2


# What follows the ServerHello.


def flight_of(
    there: Calling, app_id: AppId, make: Callable[[tls13.Server, Shown], bytes]
) -> Callable[[SocketChannel], None]:
    """Send what `make` gives after a good ServerHello; nothing but an alert may come back."""

    def serve(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        server.read_client_hello()
        server.agree()
        server.show(make(server, good(there, app_id)))
        expect_nothing_but_alerts(server)
        assert server.application_data == b""

    return serve


def told(answer: Answer, code: str) -> str:
    return str(problem(answer, code, 502)["detail"])


async def test_the_control(new: Calling) -> None:
    """A hand-made target that is all as it should be is asked."""
    app_id = new_app_id()
    got: list[bytes] = []

    def serve(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        server.read_client_hello()
        server.agree()
        server.show(server.flight(good(new, app_id), ask=True))
        assert server.read_answer() == [tls.CERTIFICATE, tls.CERTIFICATE_VERIFY, tls.FINISHED]
        got.append(server.read_until(lambda data: data.endswith(b"secret body")))
        server.send(tls.APPLICATION_DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        server.send(tls.ALERT, b"\1\0")

    assert (await new.ask(serve, app_id)).body == b"ok"
    assert got[0].startswith(b"POST /secret HTTP/1.1\r\n")


async def test_the_control_of_1_2(old: Calling) -> None:
    app_id = new_app_id()

    def serve(channel: SocketChannel) -> None:
        server = tls12.Server(channel)
        server.read_client_hello()
        server.show(good(old, app_id))
        while not server.application_data.endswith(b"secret body"):
            server.read_record()
        server.send(tls.APPLICATION_DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        server.send(tls.ALERT, b"\1\0")

    assert (await old.ask(serve, app_id)).body == b"ok"


def without_proof(server: tls13.Server, shown: Shown) -> bytes:
    """The target's real certificate, which everybody can see, and no signature."""
    said = server.encrypted_extensions() + server.certificate(shown.certificates)
    return said + server.finished(said)


def stolen(server: tls13.Server, shown: Shown) -> bytes:
    """The target's real certificate, and the signature of another key."""
    return server.flight(Shown(shown.certificates, ec.generate_private_key(ec.SECP256R1())))


def replayed(server: tls13.Server, shown: Shown) -> bytes:
    """A signature of the right key, over another handshake."""
    assert shown.key is not None
    said = server.encrypted_extensions() + server.certificate(shown.certificates)
    said += server.verify(shown.key, b"another handshake")
    return said + server.finished(said)


def as_a_client(server: tls13.Server, shown: Shown) -> bytes:
    """A signature of the right key over this handshake, as a caller would make it."""
    assert shown.key is not None
    said = server.encrypted_extensions() + server.certificate(shown.certificates)
    said += server.verify(shown.key, said, context=tls13.Client.own_context)
    return said + server.finished(said)


def by_sha_1(server: tls13.Server, shown: Shown) -> bytes:
    assert shown.key is not None
    said = server.encrypted_extensions() + server.certificate(shown.certificates)
    said += server.verify(shown.key, said, scheme=0x0203, digest=hashes.SHA1())
    return said + server.finished(said)


def without_certificate(server: tls13.Server, shown: Shown) -> bytes:
    said = server.encrypted_extensions()
    return said + server.finished(said)


def empty_certificate(server: tls13.Server, shown: Shown) -> bytes:
    said = server.encrypted_extensions() + server.certificate(())
    return said + server.finished(said)


def wrong_finished(server: tls13.Server, shown: Shown) -> bytes:
    flight = server.flight(shown)
    return flight[:-1] + bytes([flight[-1] ^ 1])


def without_finished(server: tls13.Server, shown: Shown) -> bytes:
    return server.flight(shown)[:-36]


def alpn_h2(server: tls13.Server, shown: Shown) -> bytes:
    assert shown.key is not None
    said = server.encrypted_extensions(tls.extension(tls.ALPN, b"\0\3\2h2"))
    said += server.certificate(shown.certificates)
    said += server.verify(shown.key, said)
    return said + server.finished(said)


def hello_again(server: tls13.Server, shown: Shown) -> bytes:
    return server.server_hello() + server.flight(shown)


def twice(server: tls13.Server, shown: Shown) -> bytes:
    assert shown.key is not None
    said = server.encrypted_extensions() + 2 * server.certificate(shown.certificates)
    said += server.verify(shown.key, said)
    return said + server.finished(said)


def proof_first(server: tls13.Server, shown: Shown) -> bytes:
    assert shown.key is not None
    said = server.encrypted_extensions()
    said += server.verify(shown.key, said) + server.certificate(shown.certificates)
    return said + server.finished(said)


def lying_list(server: tls13.Server, shown: Shown) -> bytes:
    message = bytearray(server.certificate(shown.certificates))
    message[5:8] = (int.from_bytes(message[5:8]) + 1).to_bytes(3)
    said = server.encrypted_extensions() + bytes(message)
    return said + server.finished(said)


def endless_certificate(server: tls13.Server, shown: Shown) -> bytes:
    """Announces 16 MB, and sends a good part of it."""
    head = bytes([tls.CERTIFICATE]) + (0xFFFFFF).to_bytes(3)
    return server.encrypted_extensions() + head + bytes(1_000_000)


FLIGHTS = {
    "without proof": without_proof,
    "stolen certificate": stolen,
    "proof of another handshake": replayed,
    "proof in the other role": as_a_client,
    "SHA-1": by_sha_1,
    "no certificate": without_certificate,
    "empty certificate": empty_certificate,
    "wrong Finished": wrong_finished,
    "ALPN": alpn_h2,
    "ServerHello again": hello_again,
    "certificate twice": twice,
    "proof before certificate": proof_first,
    "a list's length that lies": lying_list,
    "a certificate without end": endless_certificate,
}


@pytest.mark.parametrize("name", FLIGHTS)
async def test_a_flight_that_is_wrong_gets_nothing(new: Calling, name: str) -> None:
    app_id = new_app_id()
    assert told(await new.ask(flight_of(new, app_id, FLIGHTS[name]), app_id), "tls_failed")


async def test_a_target_that_never_finishes_gets_nothing(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Its Finished is missing: the time for a connection ends it."""
    async with calling(
        tmp_path_factory.mktemp("short"), "1.3", MESH_CONNECT_TIMEOUT="500ms"
    ) as there:
        app_id = new_app_id()
        answer = await there.ask(flight_of(there, app_id, without_finished), app_id)
        problem(answer, "connect_timeout", 504)


async def test_data_before_the_handshake_is_over_is_refused(new: Calling) -> None:
    """An answer that nobody asked for, between ServerHello and Finished."""
    app_id = new_app_id()

    def serve(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        server.read_client_hello()
        server.agree()
        server.say(server.encrypted_extensions())
        server.send(tls.APPLICATION_DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")
        expect_nothing_but_alerts(server)

    problem(await new.ask(serve, app_id), "tls_failed", 502)


# TLS 1.2's own ways.


def exchange_of(
    there: Calling,
    app_id: AppId,
    make: Callable[[tls12.Server, Shown], bytes],
) -> Callable[[SocketChannel], None]:
    def serve(channel: SocketChannel) -> None:
        server = tls12.Server(channel)
        server.read_client_hello()
        shown = good(there, app_id)
        server.say(server.hello(), server.certificate(shown.certificates))
        server.say(make(server, shown), tls.message(tls.SERVER_HELLO_DONE, b""))
        expect_nothing_but_alerts(server)

    return serve


def key_of(shown: Shown) -> ec.EllipticCurvePrivateKey:
    assert shown.key is not None
    return shown.key


EXCHANGES: dict[str, Callable[[tls12.Server, Shown], bytes]] = {
    "stolen certificate": lambda server, _: server.key_exchange(
        ec.generate_private_key(ec.SECP256R1())
    ),
    "SHA-1": lambda server, shown: server.key_exchange(
        key_of(shown), scheme=0x0203, digest=hashes.SHA1()
    ),
    "MD5": lambda server, shown: server.key_exchange(key_of(shown), scheme=0x0103),
    "weak group": lambda server, shown: server.key_exchange(key_of(shown), group=0x0010),
    "group that was not offered": lambda server, shown: server.key_exchange(
        key_of(shown), group=0x0016
    ),
    "share of zeros": lambda server, shown: server.key_exchange(key_of(shown), share=bytes(32)),
    "no share": lambda server, shown: server.key_exchange(key_of(shown), share=b""),
    "no exchange": lambda server, shown: b"",
    "nonsense": lambda server, shown: tls.message(tls.SERVER_KEY_EXCHANGE, b"\x03\x00"),
}


@pytest.mark.parametrize("name", EXCHANGES)
async def test_a_key_exchange_that_is_wrong_gets_nothing(old: Calling, name: str) -> None:
    app_id = new_app_id()
    assert told(await old.ask(exchange_of(old, app_id, EXCHANGES[name]), app_id), "tls_failed")


async def test_a_target_that_took_the_offer_of_1_3_away_is_refused(old: Calling) -> None:
    """RFC 8446 4.1.3: its random says that it knows 1.3, so somebody between changed the offer."""
    app_id = new_app_id()

    def serve(channel: SocketChannel) -> None:
        server = tls12.Server(channel)
        server.read_client_hello()
        server.server_random = server.server_random[:24] + b"DOWNGRD\x01"
        channel.send(tls.record(tls.HANDSHAKE, server.hello()))
        expect_nothing_but_alerts(server)

    problem(await old.ask(serve, app_id), "tls_failed", 502)

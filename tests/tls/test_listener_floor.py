"""What our server takes of versions, suites, groups and signatures, from callers of any age."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.tls import records as tls
from tests.tls import tls12, tls13
from tests.tls.records import Hello, SocketChannel
from tests.tls.scene import ASK, Listening, listening

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROTOCOL_VERSION, HANDSHAKE_FAILURE = 70, 40
OLD = {"SSL 3.0": tls.SSL_3, "TLS 1.0": tls.TLS_1_0, "TLS 1.1": tls.TLS_1_1}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def new(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Listening]:
    """With the default, TLS 1.3 alone."""
    async with listening(tmp_path_factory.mktemp("new"), "1.3") as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def old(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Listening]:
    """With `MESH_TLS_MIN_VERSION=1.2`."""
    async with listening(tmp_path_factory.mktemp("old"), "1.2") as one:
        yield one


def hello_of(version: int, suites: tuple[int, ...] = (0xC02B, 0xC02F, 0x002F, 0x000A)) -> bytes:
    """Give a ClientHello as a client that knows nothing newer than `version` writes it."""
    hello = Hello(version, suites=suites)
    if version > tls.SSL_3:
        hello.extensions = tls.usual_extensions(versions=(version,))
    return hello.record()


@pytest.mark.parametrize("name", OLD)
async def test_versions_below_1_2_are_refused_always(
    new: Listening, old: Listening, name: str
) -> None:
    for there in (new, old):
        answer = await there.say(hello_of(OLD[name]))
        assert tls.alerts(answer) in ([PROTOCOL_VERSION], [HANDSHAKE_FAILURE])
        assert not tls.handshake_messages(answer)


@pytest.mark.parametrize("name", OLD)
async def test_old_versions_are_refused_when_named_in_the_extension_too(
    new: Listening, old: Listening, name: str
) -> None:
    """RFC 8446 4.2.1: where `supported_versions` is there, it alone counts."""
    only = tls.extension(tls.VERSIONS, tls.vector(1, tls.u16s(OLD[name])))
    hello = Hello(extensions=[*tls.usual_extensions(versions=(tls.TLS_1_2,)), only])
    for there in (new, old):
        assert tls.alerts(await there.say(hello.record())) == [PROTOCOL_VERSION]


async def test_tls_1_2_is_refused_by_default(new: Listening) -> None:
    assert tls.alerts(await new.say(hello_of(tls.TLS_1_2))) == [PROTOCOL_VERSION]


async def test_tls_1_2_is_spoken_where_it_is_allowed(old: Listening) -> None:
    kinds = [kind for kind, _ in tls.handshake_messages(await old.say(hello_of(tls.TLS_1_2)))]
    assert kinds == [
        tls.SERVER_HELLO,
        tls.CERTIFICATE,
        tls.SERVER_KEY_EXCHANGE,
        tls.CERTIFICATE_REQUEST,
        tls.SERVER_HELLO_DONE,
    ]


async def test_an_sslv2_hello_is_refused(new: Listening, old: Listening) -> None:
    body = b"\x01\x00\x02" + tls.u16s(3, 0, 16) + b"\x07\x00\xc0" + bytes(16)
    for there in (new, old):
        answer = await there.say((0x8000 | len(body)).to_bytes(2) + body)
        assert not tls.handshake_messages(answer)


async def test_a_downgraded_hello_is_marked_in_the_random(old: Listening) -> None:
    """RFC 8446 4.1.3: so that a client that offered 1.3 sees that someone took the offer away."""
    ((_, body), *_) = tls.handshake_messages(await old.say(hello_of(tls.TLS_1_2)))
    assert body[2:34].endswith(b"DOWNGRD\x01")


async def test_a_fallback_is_refused(old: Listening) -> None:
    """RFC 7507: a client that says it tried a newer version before."""
    answer = await old.say(hello_of(tls.TLS_1_2, (0xC02B, 0x5600)))
    assert tls.alerts(answer) == [86]


# The hand-made peers are what later tests rest on: these are their controls.


async def test_a_hand_made_caller_is_served(new: Listening, old: Listening) -> None:
    for there in (new, old):

        def call(channel: SocketChannel, there: Listening = there) -> bytes:
            client = tls13.Client(channel)
            client.handshake(there.good())
            return client.ask(ASK)

        before = there.seen()[1]
        with pytest.raises(AssertionError, match="something reached the backend"):
            assert await there.attack(call) == b"HTTP/1.1 404 Not Found"
        assert there.seen()[1] == before + 1


async def test_a_hand_made_caller_of_1_2_is_served(old: Listening) -> None:
    answers: list[bytes] = []

    def call(channel: SocketChannel) -> None:
        client = tls12.Client(channel)
        client.handshake(old.good())
        answers.append(client.ask(ASK))

    with pytest.raises(AssertionError, match="something reached the backend"):
        await old.attack(call)
    assert answers == [b"HTTP/1.1 404 Not Found"]


async def test_without_any_signature_algorithm_1_2_is_refused(old: Listening) -> None:
    """Where a client names none it means SHA-1 (RFC 5246 7.4.1.4.1)."""
    groups = tls.extension(tls.GROUPS, tls.vector(2, tls.u16s(tls.X25519, tls.SECP256R1)))
    answer = await old.say(Hello(extensions=[groups]).record())
    assert tls.alerts(answer) == [HANDSHAKE_FAILURE]


async def test_what_the_listener_asks_callers_to_sign_with_is_strong(old: Listening) -> None:
    messages = dict(tls.handshake_messages(await old.say(hello_of(tls.TLS_1_2))))
    reader = tls.Reader(messages[tls.CERTIFICATE_REQUEST])
    reader.vector(1)
    schemes = tls.Reader(reader.vector(2)).numbers()
    assert schemes
    assert not [scheme for scheme in schemes if scheme >> 8 < 3], "neither MD5 nor SHA-1"


@pytest.mark.parametrize("suite", [0x0005, 0x000A, 0x002F, 0x009C, 0xC013, 0xC009, 0xC02F, 0x0003])
async def test_a_suite_that_is_not_taken_is_told_by_an_alert(old: Listening, suite: int) -> None:
    answer = await old.say(hello_of(tls.TLS_1_2, (suite,)))
    assert tls.alerts(answer) == [HANDSHAKE_FAILURE]


@pytest.mark.parametrize("compressions", [b"\1\0", b"\0\1\x40"])
async def test_compression_is_off(old: Listening, compressions: bytes) -> None:
    hello = Hello(compressions=compressions)
    hello.extensions = tls.usual_extensions(versions=(tls.TLS_1_2,))
    ((kind, body), *_) = tls.handshake_messages(await old.say(hello.record()))
    assert kind == tls.SERVER_HELLO
    reader = tls.Reader(body)
    reader.take(34)
    reader.vector(1)
    reader.take(2)
    assert reader.number(1) == 0


@pytest.mark.parametrize("compressions", [b"", b"\1"])
async def test_a_caller_that_wants_compression_is_refused(
    old: Listening, new: Listening, compressions: bytes
) -> None:
    hello = Hello(compressions=compressions)
    hello.extensions = tls.usual_extensions(versions=(tls.TLS_1_2,))
    assert tls.alerts(await old.say(hello.record()))
    hello.extensions = tls.usual_extensions(share=bytes(range(32)))
    assert tls.alerts(await new.say(hello.record())) in ([47], [50])

"""What is no proper ClientHello: lengths that lie, floods, huge and tiny ones, other protocols."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.integration.harness import Client, problem, request
from tests.integration.tls_peers import caller_context
from tests.tls import records as tls
from tests.tls.records import Hello, SocketChannel, extension, vector
from tests.tls.scene import CALLER, Listening, listening, resident

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
SHARE = bytes(range(1, 33))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Listening]:
    async with listening(tmp_path_factory.mktemp("b"), "1.2") as one:
        yield one


def hello(*more: bytes) -> Hello:
    """A ClientHello of TLS 1.3 that is answered, with more extensions."""
    return Hello(extensions=[*tls.usual_extensions(share=SHARE), *more])


def accepted(data: bytes) -> bool:
    """Whether a ServerHello came, and nothing that is not TLS."""
    records = tls.split_records(data)
    return any(kind == tls.HANDSHAKE and content[:1] == b"\2" for kind, content in records)


async def refused(there: Listening, data: bytes) -> None:
    """Expect a fatal alert or just the end."""
    answer = await there.say(data)
    assert not accepted(answer)
    assert len(tls.alerts(answer)) <= 1


async def test_the_control(there: Listening) -> None:
    assert accepted(await there.say(hello().record()))
    assert accepted(await there.say(hello(tls.server_name(b"b.test")).record()))


# Lengths that lie.


def positions(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Find every length field of a ClientHello's record: what of, where, of how many bytes."""
    yield from (("record", 3, 2), ("message", 6, 3), ("session id", 43, 1))
    at = 44 + data[43]
    yield "suites", at, 2
    at += 2 + int.from_bytes(data[at : at + 2])
    yield "compressions", at, 1
    at += 1 + data[at]
    yield "extensions", at, 2
    at += 2
    while at < len(data):
        kind, size = (int.from_bytes(data[at + skip : at + skip + 2]) for skip in (0, 2))
        yield f"extension {kind}", at + 2, 2
        inner = {tls.VERSIONS: 1, tls.PSK_MODES: 1, tls.POINT_FORMATS: 1}.get(kind, 2)
        yield f"list in extension {kind}", at + 4, inner
        if kind == tls.KEY_SHARE:
            yield "share", at + 8, 2
        if kind == tls.SERVER_NAME:
            yield "name", at + 7, 2
        at += 4 + size


def rich(*more: bytes, version: int) -> Hello:
    """A hello with everything in it that OpenSSL reads for this version."""
    named = [tls.server_name(b"b.test"), extension(tls.ALPN, vector(2, vector(1, b"http/1.1")))]
    usual = tls.usual_extensions(versions=(version,), share=SHARE)
    return Hello(session_id=bytes(32), extensions=[*usual, *named, *more])


RICH = rich(extension(tls.PSK_MODES, vector(1, b"\1")), version=tls.TLS_1_3)
RICH_1_2 = rich(extension(tls.POINT_FORMATS, vector(1, b"\0")), version=tls.TLS_1_2)
POSITIONS = [
    (f"{version}, {name}", hello.record(), at, size)
    for version, hello in (("1.3", RICH), ("1.2", RICH_1_2))
    for name, at, size in positions(hello.record())
]


async def test_every_length_field_is_found(there: Listening) -> None:
    found = len(POSITIONS)
    assert found == 12 + 2 * (len(RICH.extensions) + len(RICH_1_2.extensions)) + 3
    for name, data, at, size in POSITIONS:
        assert at + size + int.from_bytes(data[at : at + size]) <= len(data), name
        assert accepted(await there.say(data))


@pytest.mark.parametrize("lie", ["0", "-1", "+1", "half", "double", "all ones"])
@pytest.mark.parametrize("where", POSITIONS, ids=[name for name, *_ in POSITIONS])
async def test_a_length_that_lies(
    there: Listening, where: tuple[str, bytes, int, int], lie: str
) -> None:
    _, data, at, size = where
    true = int.from_bytes(data[at : at + size])
    most = (1 << 8 * size) - 1
    said = {
        "0": 0,
        "-1": true - 1,
        "+1": true + 1,
        "half": true // 2,
        "double": 2 * true,
        "all ones": most,
    }[lie]
    if not 0 <= said <= most or said == true:
        pytest.skip("no other number fits")
    await refused(there, data[:at] + said.to_bytes(size) + data[at + size :])


async def test_hellos_of_noise(there: Listening) -> None:
    """Bytes changed at random, and heads of a hello before random bytes: no harm."""
    source = random.Random(4)
    good = RICH.record()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(source.randrange(1, 8)):
            data[source.randrange(len(data))] = source.randrange(256)
        await there.say(bytes(data))
    for _ in range(100):
        await there.say(good[: source.randrange(len(good))] + source.randbytes(300))


async def test_every_head_of_a_hello_may_be_all_there_is(there: Listening) -> None:
    good = RICH.record()
    for end in range(0, len(good), 3):
        await refused(there, good[:end])


# Sizes and pieces.


@pytest.mark.parametrize("size", [1, 2, 5, 16, 100])
async def test_a_hello_in_small_records(there: Listening, size: int) -> None:
    """RFC 8446 5.1 allows any fragmentation."""
    assert accepted(await there.say(tls.in_records(tls.HANDSHAKE, hello().message(), size)))


async def test_a_hello_byte_by_byte_on_the_wire(there: Listening) -> None:
    def act(channel: SocketChannel) -> bytes:
        for byte in hello().record():
            channel.send(bytes([byte]))
        channel.finish()
        return channel.to_end()

    assert accepted(await there.attack(act))


@pytest.mark.parametrize("size", [16_000, 60_000])
async def test_a_large_hello(there: Listening, size: int) -> None:
    """As post-quantum shares and many tickets make them; OpenSSL stops at 128 KiB."""
    padding = extension(21, bytes(size))
    assert accepted(await there.say(hello(padding).record()))


async def test_a_hello_over_128_kib(there: Listening) -> None:
    head = bytes([tls.CLIENT_HELLO]) + (0x20100).to_bytes(3)
    await refused(there, tls.in_records(tls.HANDSHAKE, head + RICH.body() + bytes(0x20100)))


@pytest.mark.parametrize("announced", [0x20100, 0xFFFFFF])
async def test_a_hello_that_announces_megabytes_takes_none(
    there: Listening, announced: int
) -> None:
    head = bytes([tls.CLIENT_HELLO]) + announced.to_bytes(3)
    data = tls.in_records(tls.HANDSHAKE, head + bytes(4 * MIB))
    await refused(there, data)
    before = resident()
    for _ in range(10):
        await refused(there, data)
    assert resident() - before < 8 * MIB


@pytest.mark.parametrize("size", [tls.MAX_PLAINTEXT + 1, tls.MAX_PLAINTEXT + 257, 0xFF00])
async def test_a_record_over_the_limit(there: Listening, size: int) -> None:
    short = len(hello(extension(21, b"")).message())
    whole = hello(extension(21, bytes(size - short))).message()
    assert len(whole) == size
    assert accepted(await there.say(tls.in_records(tls.HANDSHAKE, whole)))
    await refused(there, tls.record(tls.HANDSHAKE, whole))


FLOODS = {
    "empty handshake records": tls.record(tls.HANDSHAKE, b"") * 20_000,
    "empty alerts": tls.record(tls.ALERT, b"") * 20_000,
    "warnings": tls.record(tls.ALERT, b"\1\x5a") * 20_000,
    "fatal alerts": tls.record(tls.ALERT, b"\2\x28") * 20_000,
    "unknown alerts": tls.record(tls.ALERT, b"\7\xff") * 20_000,
    "close_notify": tls.record(tls.ALERT, b"\1\0") * 20_000,
    "long alerts": tls.record(tls.ALERT, bytes(16_000)) * 20,
    "ChangeCipherSpec": tls.record(tls.CHANGE_CIPHER_SPEC, b"\1") * 20_000,
    "long ChangeCipherSpec": tls.record(tls.CHANGE_CIPHER_SPEC, bytes(1000)) * 100,
    "application data": tls.record(tls.APPLICATION_DATA, bytes(1000)) * 1000,
    "heartbeats": tls.record(24, b"\1\x40\0") * 1000,
    "unknown records": tls.record(99, b"x") * 20_000,
    "hello requests": tls.record(tls.HANDSHAKE, tls.message(0, b"")) * 20_000,
    "finished": tls.record(tls.HANDSHAKE, tls.message(tls.FINISHED, bytes(32))) * 1000,
}


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_instead_of_a_hello(there: Listening, name: str) -> None:
    before = resident()
    for _ in range(5):
        await refused(there, FLOODS[name])
    assert resident() - before < 8 * MIB


@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_after_a_hello(there: Listening, name: str) -> None:
    """The handshake never gets to its end: the listener ends it, or the attacker's own end does."""

    def act(channel: SocketChannel) -> bytes:
        channel.send(hello().record())
        channel.send(FLOODS[name])
        channel.finish()
        return channel.to_end()

    tls.split_records(await there.attack(act))


@pytest.mark.parametrize(
    "kind", [tls.CHANGE_CIPHER_SPEC, tls.ALERT, tls.APPLICATION_DATA, 24, 0, 255]
)
async def test_a_hello_in_a_record_of_another_kind(there: Listening, kind: int) -> None:
    await refused(there, tls.record(kind, hello().message()))


@pytest.mark.parametrize("kind", [*range(1), *range(2, 26), 67, 254, 255])
async def test_another_message_first(there: Listening, kind: int) -> None:
    await refused(there, tls.record(tls.HANDSHAKE, tls.message(kind, hello().body())))


@pytest.mark.parametrize("version", [0x0000, 0x0200, 0x0400, 0x7F1C, 0xFFFF])
async def test_a_record_of_no_version(there: Listening, version: int) -> None:
    answer = await there.say(tls.record(tls.HANDSHAKE, hello().message(), version))
    assert not accepted(answer) or version >> 8 == 3


async def test_two_hellos(there: Listening) -> None:
    both = hello().record() + hello().record()
    tls.split_records(await there.say(both))


# Extensions.


@pytest.mark.parametrize(
    "kind",
    [
        tls.SERVER_NAME,
        tls.GROUPS,
        tls.SIGNATURES,
        tls.ALPN,
        tls.VERSIONS,
        tls.KEY_SHARE,
        21,
        0x5A5A,
    ],
)
async def test_a_repeated_extension(there: Listening, kind: int) -> None:
    """RFC 8446 4.2: at most one of each. OpenSSL minds for those it knows."""
    rich = hello(
        tls.server_name(b"b.test"),
        extension(tls.ALPN, vector(2, vector(1, b"http/1.1"))),
        extension(21, b"\0"),
        extension(0x5A5A, b""),
    )
    again = [one for one in rich.extensions if one[:2] == kind.to_bytes(2)]
    rich.extensions += again
    assert len(again) == 1
    answer = await there.say(rich.record())
    assert not accepted(answer) or kind in (21, 0x5A5A)


async def test_extensions_nobody_knows(there: Listening) -> None:
    unknown = [extension(0x4000 + number, os.urandom(20)) for number in range(500)]
    assert accepted(await there.say(hello(*unknown).record()))


NAMES = {
    "empty": b"",
    "with NUL": b"good.test\0.evil.test",
    "not ASCII": "bücher.test".encode(),
    "control bytes": b"a\r\nb: c",
    "255 bytes": b"a" * 255,
    "256 bytes": b"a" * 256,
    "64 KB": b"a" * 65_000,
    "an address": b"127.0.0.1",
}


@pytest.mark.parametrize("name", NAMES)
async def test_a_server_name_means_nothing_and_harms_nothing(there: Listening, name: str) -> None:
    """Who is asked for is told by nobody's name; what OpenSSL cannot read is refused."""
    answer = await there.say(hello(tls.server_name(NAMES[name])).record())
    if accepted(answer):
        assert name in ("empty", "not ASCII", "control bytes", "255 bytes", "an address")


async def test_no_server_name_at_all(there: Listening) -> None:
    context = caller_context(there.kms.root_pem, there.kms.issue(CALLER))
    context.check_hostname = False
    reader, writer = await asyncio.open_connection(
        there.address.host, there.address.port, ssl=context, server_hostname=""
    )
    client = Client(reader, writer)
    await client.send(request())
    assert (await client.answer()).body == b"hello\n"
    writer.close()


@pytest.mark.parametrize("name", ["b.test", "elsewhere.example", "*.test", "x" * 63 + ".test"])
async def test_any_server_name_leads_to_the_same(there: Listening, name: str) -> None:
    context = caller_context(there.kms.root_pem)
    context.check_hostname = False
    reader, writer = await asyncio.open_connection(
        there.address.host, there.address.port, ssl=context, server_hostname=name
    )
    client = Client(reader, writer)
    await client.send(request())
    problem(await client.answer(), "client_cert_required", 401)
    writer.close()


@pytest.mark.parametrize(
    "protocols", [["h2"], ["h2", "http/1.1"], ["http/1.1"], ["http/1.0"], ["nonsense"], ["x" * 255]]
)
async def test_no_protocol_is_selected(there: Listening, protocols: list[str]) -> None:
    """HTTP/1.1 is what is spoken; a caller that insists on HTTP/2 sees that it was not taken."""
    context = caller_context(there.kms.root_pem, there.kms.issue(CALLER))
    context.set_alpn_protocols(protocols)
    async with Client.connect(there.address, context) as client:
        tls_object = client.writer.get_extra_info("ssl_object")
        assert tls_object.selected_alpn_protocol() is None
        await client.send(request())
        assert (await client.answer()).body == b"hello\n"


# Other protocols.

OTHERS = {
    "HTTP/1.1": b"GET /secret HTTP/1.1\r\nHost: b\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n",
    "health": b"GET /health HTTP/1.1\r\nHost: b\r\n\r\n",
    "CONNECT": b"CONNECT b:443 HTTP/1.1\r\nHost: b\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "PROXY v1": b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n",
    "PROXY v2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12),
    "SSH": b"SSH-2.0-x\r\n",
    "SMTP": b"EHLO x\r\n",
    "NULs": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "lines": b"\r\n" * 50_000,
}


@pytest.mark.parametrize("name", OTHERS)
async def test_what_is_not_tls_gets_no_answer_in_the_clear(there: Listening, name: str) -> None:
    answer = await there.say(OTHERS[name])
    assert b"HTTP" not in answer
    await refused(there, OTHERS[name])


@pytest.mark.parametrize("name", ["HTTP/1.1", "PROXY v1", "PROXY v2"])
async def test_what_is_said_before_tls_is_not_part_of_it(there: Listening, name: str) -> None:
    await refused(there, OTHERS[name] + hello().record())


async def test_hostile_hellos_cost_no_memory(there: Listening) -> None:
    """The same again and again: 20 MB of refused hellos, and as many half ones."""
    large = hello(extension(21, bytes(60_000))).record()
    attacks = [RICH.record()[:-1] + b"\xff", large, large[:-1], FLOODS["warnings"][:50_000]]
    for data in attacks:
        await there.say(data)
    before = resident()
    for _ in range(80):
        for data in attacks:
            await there.say(data)
    assert resident() - before < 8 * MIB

"""After and around a handshake: renegotiation, resumption, early data, key updates, floods."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.integration.harness import eventually, problem
from tests.integration.tls_peers import new_app_id
from tests.tls import records as tls
from tests.tls import tls12, tls13
from tests.tls.records import SocketChannel
from tests.tls.scene import ASK, Calling, Listening, calling, listening, resident
from tests.tls.tls13 import AlertReceived, Ended, Shown

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK"
MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Listening]:
    async with listening(tmp_path_factory.mktemp("b"), "1.2") as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ours(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Calling]:
    async with calling(tmp_path_factory.mktemp("a"), "1.2") as one:
        yield one


# Renegotiation, which only TLS 1.2 has.


async def test_a_caller_cannot_renegotiate(there: Listening) -> None:
    """It is told so by a warning (RFC 5746 4.5), or cut; no second handshake begins."""

    def act(channel: SocketChannel) -> tuple[list[int], int | None]:
        client = tls12.Client(channel)
        client.handshake(there.good())
        assert client.ask(HEALTH) == OK
        client.hello()
        kinds: list[int] = []
        try:
            while True:
                kinds.append(client.read_record()[0])
        except AlertReceived as alert:
            return kinds, alert.code
        except Ended:
            return kinds, None

    assert await there.attack(act) in [([], 100), ([], 10), ([], 40), ([], None)]


async def test_a_flood_of_renegotiations_that_reads_nothing_is_cut(there: Listening) -> None:
    """Each attempt is answered by an alert: 15 MB of them may not pile up 5 MB of those."""
    hello = tls.Hello(suites=(tls.ECDHE_ECDSA_AES_128_GCM_SHA256, tls12.SCSV))
    hello.extensions = tls.usual_extensions(versions=(tls.TLS_1_2,))
    again = hello.message()
    grown: list[int] = []

    def act(channel: SocketChannel) -> None:
        client = tls12.Client(channel)
        client.handshake(there.good())
        assert client.ask(HEALTH) == OK
        assert client.sending is not None
        before = resident()
        for _ in range(400):
            flood = b"".join(client.sending.seal(tls.HANDSHAKE, again) for _ in range(1_000))
            try:
                channel.sock.sendall(flood)
            except (ConnectionError, TimeoutError):
                grown.append(resident() - before)
                return
        raise AssertionError("nobody stopped it")

    await there.attack(act)
    assert grown[0] < 8 * MIB


async def test_a_target_cannot_renegotiate(ours: Calling) -> None:
    """After its HelloRequest no ClientHello comes, and the call is answered on that connection."""
    app_id = new_app_id()
    kinds: list[int] = []

    def serve(channel: SocketChannel) -> None:
        server = tls12.Server(channel)
        server.read_client_hello()
        server.show(Shown.of(ours.kms.issue(app_id)))
        server.send(tls.HANDSHAKE, tls.message(tls.HELLO_REQUEST, b""))
        try:
            while not server.application_data.endswith(b"secret body"):
                kinds.append(server.read_record()[0])
            server.send(tls.APPLICATION_DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            server.send(tls.ALERT, b"\1\0")
        except (AlertReceived, Ended):
            return

    answer = await ours.ask(serve, app_id)
    assert tls.HANDSHAKE not in kinds
    assert (answer.status, answer.error) in [(200, ""), (502, "upstream_closed")]


# Resumption and early data. `test_callers.py` has OpenSSL try to resume; here it is by hand.


async def test_no_ticket_is_given(there: Listening) -> None:
    def act(channel: SocketChannel) -> None:
        client = tls13.Client(channel)
        client.hello(tls.extension(tls.PSK_MODES, b"\1\1"), tls.extension(tls.SESSION_TICKET, b""))
        client.read_flight()
        client.show(there.good())
        client.send(tls.APPLICATION_DATA, HEALTH.replace(b"Host", b"Connection: close\r\nHost"))
        kinds = set()
        try:
            while True:
                kinds.add(client.read_record()[0])
        except AlertReceived as received:
            code = received.code
        assert (kinds, code) == ({tls.APPLICATION_DATA}, 0)

    await there.attack(act)


async def test_no_ticket_and_no_session_id_is_given_with_1_2(there: Listening) -> None:
    def act(channel: SocketChannel) -> None:
        client = tls12.Client(channel)
        client.hello(tls.extension(tls.SESSION_TICKET, b""))
        hello = tls.Reader(client.read_flight()[tls.SERVER_HELLO])
        hello.take(34)
        hello.vector(1)
        hello.take(3)
        assert tls.SESSION_TICKET not in tls.read_extensions(hello.vector(2))
        client.say(client.certificate(()), client.key_exchange())
        client.change_cipher_spec()
        client.say(client.finished(b"client finished"))
        assert client.read_message()[0] == tls.FINISHED  # a ticket would come before

    await there.attack(act)


@pytest.mark.parametrize("ticket", [b"", bytes(range(200))], ids=["", "ticket"])
@pytest.mark.parametrize("session_id", [b"", bytes(range(32))], ids=["", "id"])
async def test_a_made_up_session_is_not_taken_up(
    there: Listening, session_id: bytes, ticket: bytes
) -> None:
    """A full handshake is done instead, in which the caller has to show who it is."""
    hello = tls.Hello(session_id=session_id)
    hello.extensions = tls.usual_extensions(versions=(tls.TLS_1_2,))
    hello.extensions.append(tls.extension(tls.SESSION_TICKET, ticket))
    kinds = [kind for kind, _ in tls.handshake_messages(await there.say(hello.record()))]
    assert kinds[:2] == [tls.SERVER_HELLO, tls.CERTIFICATE]


def psk_extension(identity: bytes) -> bytes:
    identities = tls.vector(2, tls.vector(2, identity) + bytes(4))
    return tls.extension(tls.PRE_SHARED_KEY, identities + tls.vector(2, tls.vector(1, bytes(32))))


@pytest.mark.parametrize("early", [b"", ASK, bytes(20_000)])
async def test_a_made_up_psk_and_early_data_get_nowhere(there: Listening, early: bytes) -> None:
    """0-RTT could be replayed by whoever saw it: it is never read as data, let alone forwarded."""

    def act(channel: SocketChannel) -> tuple[set[int], int | None]:
        client = tls13.Client(channel)
        more = [tls.extension(tls.PSK_MODES, b"\2\0\1")]
        more += [tls.extension(tls.EARLY_DATA, b"")] if early else []
        client.hello(*more, psk_extension(os.urandom(120)))
        for at in range(0, len(early), 10_000):
            piece = early[at : at + 10_000]
            channel.send(tls.record(tls.APPLICATION_DATA, piece + bytes(17)))
        try:
            client.read_flight()
        except AlertReceived as alert:
            return set(), alert.code
        assert tls.EARLY_DATA not in client.encrypted_extensions
        found = set(client.server_extensions)
        channel.finish()
        return found, client.read_to_end()

    found, _ = await there.attack(act)
    assert tls.PRE_SHARED_KEY not in found


async def test_after_refused_early_data_a_full_handshake_is_possible(there: Listening) -> None:
    """And without a certificate in it nothing but `/health` is: the early bytes count for nothing.

    OpenSSL may skip what it cannot decrypt, or end the handshake; both are fine.
    """

    def act(channel: SocketChannel) -> bytes:
        client = tls13.Client(channel)
        client.hello(
            tls.extension(tls.PSK_MODES, b"\1\1"),
            tls.extension(tls.EARLY_DATA, b""),
            psk_extension(os.urandom(32)),
        )
        channel.send(tls.record(tls.APPLICATION_DATA, ASK + bytes(17)))
        try:
            client.read_flight()
            client.show(None)
            return client.ask(ASK)
        except (AlertReceived, Ended):
            return b""

    assert await there.attack(act) in (b"", b"HTTP/1.1 401 Unauthorized")


# After the handshake. Event loops drop the alert that OpenSSL has for what comes then, so the end
# of the connection is what a peer sees for sure.


def ended_by(client: tls13.Client, *codes: int) -> bool:
    """Read to the end, which must come of the other side's own."""
    return client.read_to_end() in (None, *codes)


async def test_application_data_of_another_application_is_not_http(there: Listening) -> None:
    """A good caller that takes up HTTP/2 all the same gets a refusal, and the backend nothing."""

    def act(channel: SocketChannel) -> tuple[bytes, bool]:
        client = tls13.Client(channel)
        client.hello(tls.extension(tls.ALPN, tls.vector(2, b"\2h2")))
        client.read_flight()
        client.show(there.good())
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)
        return client.ask(preface), tls.ALPN in client.encrypted_extensions

    assert await there.attack(act) == (b"HTTP/1.1 400 Bad Request", False)


async def test_key_updates_by_the_thousand_cost_nothing(there: Listening) -> None:
    def act(channel: SocketChannel) -> bytes:
        client = tls13.Client(channel)
        client.handshake(there.good())
        for _ in range(5_000):
            key_update(client, asking=False)
        return client.ask(HEALTH)

    assert await there.attack(act) == OK


async def test_key_updates_that_ask_for_as_many_are_answered_while_they_are_read(
    there: Listening,
) -> None:
    def act(channel: SocketChannel) -> bytes:
        client = tls13.Client(channel)
        client.handshake(there.good())
        for _ in range(500):
            key_update(client, asking=True)
        client.send(tls.APPLICATION_DATA, HEALTH)
        answered = 0
        while not client.application_data.endswith(b"OK\n"):
            kind, content = client.read_record()
            if kind == tls.HANDSHAKE:
                assert content == tls.message(tls.KEY_UPDATE, b"\0")
                assert client.receiving is not None
                client.receiving = client.receiving.updated()
                answered += 1
        assert 0 < answered <= 500
        return client.application_data.partition(b"\r\n")[0]

    assert await there.attack(act) == OK


def key_update(peer: tls13.Peer, *, asking: bool) -> None:
    peer.send(tls.HANDSHAKE, tls.message(tls.KEY_UPDATE, bytes([asking])))
    assert peer.sending is not None
    peer.sending = peer.sending.updated()


@pytest.mark.parametrize("padding", [0, 1000, 16_000])
async def test_padding_is_not_data(there: Listening, padding: int) -> None:
    def act(channel: SocketChannel) -> bytes:
        client = tls13.Client(channel)
        client.handshake(there.good())
        client.send(tls.APPLICATION_DATA, HEALTH[:10], padding)
        client.send(tls.APPLICATION_DATA, HEALTH[10:-1], padding)
        return client.ask(HEALTH[-1:])

    assert await there.attack(act) == OK


async def test_empty_records_without_end_are_cut(there: Listening) -> None:
    def act(channel: SocketChannel) -> bool:
        client = tls13.Client(channel)
        client.handshake(there.good())
        for _ in range(5_000):
            client.send(tls.APPLICATION_DATA, b"", 100)
        return ended_by(client, 10)

    assert await there.attack(act)


AFTER = {
    "certificate": tls.message(tls.CERTIFICATE, bytes(4)),
    "finished": tls.message(tls.FINISHED, bytes(32)),
    "client hello": tls.message(tls.CLIENT_HELLO, bytes(40)),
    "new session ticket": tls.message(tls.NEW_SESSION_TICKET, bytes(20)),
    "certificate request": tls.message(tls.CERTIFICATE_REQUEST, bytes(3)),
    "unknown": tls.message(200, b"x"),
    "a key update of another kind": tls.message(tls.KEY_UPDATE, b"\2"),
    "a key update too long": tls.message(tls.KEY_UPDATE, bytes(100)),
    "without end": bytes([tls.CERTIFICATE]) + b"\xff\xff\xff" + bytes(10_000),
}


@pytest.mark.parametrize("name", AFTER)
async def test_handshake_messages_after_the_handshake_end_the_connection(
    there: Listening, name: str
) -> None:
    def act(channel: SocketChannel) -> bool:
        client = tls13.Client(channel)
        client.handshake(there.good())
        client.send(tls.HANDSHAKE, AFTER[name])
        return ended_by(client, 10, 22, 40, 47, 50)

    assert await there.attack(act)


async def test_a_changed_record_ends_the_connection(there: Listening) -> None:
    """Half a request before it is not completed by anything after it."""

    def act(channel: SocketChannel) -> tuple[bool, bytes]:
        client = tls13.Client(channel)
        client.handshake(there.good())
        client.send(tls.APPLICATION_DATA, ASK[:-2])
        sealed = bytearray(client.sealed(tls.APPLICATION_DATA, b"\r\n"))
        sealed[-1] ^= 1
        channel.send(bytes(sealed))
        return ended_by(client, 20), client.application_data

    assert await there.attack(act) == (True, b"")


async def test_a_record_in_the_clear_ends_the_connection(there: Listening) -> None:
    def act(channel: SocketChannel) -> tuple[bool, bytes]:
        client = tls13.Client(channel)
        client.handshake(there.good())
        channel.send(tls.record(tls.APPLICATION_DATA, ASK))
        return ended_by(client, 10, 20, 22), client.application_data

    assert await there.attack(act) == (True, b"")


async def test_a_record_sent_again_ends_the_connection(there: Listening) -> None:
    """A request that somebody on the way repeats is not served twice."""

    def act(channel: SocketChannel) -> tuple[bool, bytes]:
        client = tls13.Client(channel)
        client.handshake(there.good())
        sealed = client.sealed(tls.APPLICATION_DATA, HEALTH)
        channel.send(sealed)
        client.read_until(lambda data: b"\r\n\r\n" in data)
        channel.send(sealed)
        return ended_by(client, 20), client.application_data

    ended, data = await there.attack(act)
    assert ended
    assert data.count(OK) == 1


@pytest.mark.parametrize("size", [tls.MAX_PLAINTEXT + 1, tls.MAX_PLAINTEXT + 256])
async def test_a_record_that_holds_too_much_ends_the_connection(
    there: Listening, size: int
) -> None:
    def act(channel: SocketChannel) -> bool:
        client = tls13.Client(channel)
        client.handshake(there.good())
        client.send(tls.APPLICATION_DATA, bytes(size))
        return ended_by(client, 22)

    assert await there.attack(act)


async def test_keeping_a_connection_by_tls_alone_does_not_work(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Key updates are no request: the time for a head goes on."""
    short = {"MESH_HEAD_TIMEOUT": "400ms", "MESH_IDLE_TIMEOUT": "400ms"}
    ended = asyncio.Event()
    async with listening(tmp_path_factory.mktemp("short"), "1.3", **short) as there:
        loop = asyncio.get_running_loop()

        def act(channel: SocketChannel) -> int:
            client = tls13.Client(channel)
            client.handshake(there.good())
            channel.sock.settimeout(0.05)
            for turn in range(400):
                key_update(client, asking=False)
                try:
                    client.read_record()
                except TimeoutError:
                    continue
                except (AlertReceived, Ended):
                    loop.call_soon_threadsafe(ended.set)
                    return turn
            raise AssertionError("it is still there")

        await there.attack(act)
        assert ended.is_set()


async def test_a_targets_tickets_by_the_hundred_cost_nothing(ours: Calling) -> None:
    """Only the last is kept; where it is not taken up, the handshake is a full one."""
    app_id = new_app_id()
    ticket = bytes(8) + tls.vector(1, b"n") + tls.vector(2, os.urandom(60_000)) + b"\0\0"
    offered: list[set[int]] = []

    def serve(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        server.read_client_hello()
        offered.append(set(server.client_extensions()))
        server.agree()
        server.show(server.flight(Shown.of(ours.kms.issue(app_id))))
        server.read_answer()
        for _ in range(300):
            whole = tls.message(tls.NEW_SESSION_TICKET, ticket)
            for at in range(0, len(whole), tls.MAX_PLAINTEXT):
                server.send(tls.HANDSHAKE, whole[at : at + tls.MAX_PLAINTEXT])
        server.read_until(lambda data: b"\r\n\r\n" in data)
        server.send(
            tls.APPLICATION_DATA,
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        )
        server.send(tls.ALERT, b"\1\0")

    before = resident()
    with ours.put_up(app_id, serve) as impostor:
        for _ in range(2):
            assert (await ours.mesh.call("a", app_id)).body == b"ok"
        await eventually(lambda: impostor.connections == 2)
        await asyncio.to_thread(impostor.close)
        assert not impostor.failures
    assert resident() - before < 8 * MIB
    assert not offered[1] & {tls.SESSION_TICKET, tls.EARLY_DATA}


async def test_a_target_that_wants_to_know_us_later_is_refused(ours: Calling) -> None:
    """A CertificateRequest after the handshake (RFC 8446 4.6.2), which was not offered."""
    app_id = new_app_id()

    def serve(channel: SocketChannel) -> None:
        server = tls13.Server(channel)
        server.read_client_hello()
        assert 49 not in server.client_extensions()
        server.agree()
        server.show(server.flight(Shown.of(ours.kms.issue(app_id))))
        server.read_answer()
        server.send(tls.HANDSHAKE, server.certificate_request(b"later"))
        server.read_to_end()

    problem(await ours.ask(serve, app_id), "upstream_closed", 502)

"""Callers whose handshake has no end: cut at `MESH_HEAD_TIMEOUT` in all, however they drip."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from tests.integration.harness import eventually
from tests.tls import records as tls
from tests.tls import tls12, tls13
from tests.tls.records import Hello, SocketChannel
from tests.tls.scene import CALLER, Listening, listening
from tests.tls.tls13 import AlertReceived, Ended, Shown

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEAD_TIMEOUT = 0.6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Listening]:
    environ = {"MESH_HEAD_TIMEOUT": "600ms"}
    async with listening(tmp_path_factory.mktemp("b"), "1.2", **environ) as one:
        yield one


def hello(channel: SocketChannel) -> bytes:
    client = tls13.Client(channel)
    padding = tls.extension(21, bytes(4_000))
    extensions = [*tls.usual_extensions(share=client.share), padding]
    return Hello(extensions=extensions).record()


def nothing(channel: SocketChannel, there: Listening) -> None:
    """Say nothing at all."""


def one_byte(channel: SocketChannel, there: Listening) -> None:
    channel.send(b"\x16")


def half_a_hello(channel: SocketChannel, there: Listening) -> None:
    data = hello(channel)
    channel.send(data[: len(data) // 2])


def all_but_the_last_byte(channel: SocketChannel, there: Listening) -> None:
    channel.send(hello(channel)[:-1])


def a_hello(channel: SocketChannel, there: Listening) -> None:
    channel.send(hello(channel))


def a_certificate(channel: SocketChannel, there: Listening) -> None:
    client = tls13.Client(channel)
    client.hello()
    client.read_flight()
    client.say(client.certificate(there.good().certificates))


def all_but_finished(channel: SocketChannel, there: Listening) -> None:
    client = tls13.Client(channel)
    client.hello()
    client.read_flight()
    shown = there.good()
    assert shown.key is not None
    certificate = client.certificate(shown.certificates)
    client.say(certificate + client.verify(shown.key, certificate))


def all_but_a_byte_of_finished(channel: SocketChannel, there: Listening) -> None:
    client = tls13.Client(channel)
    client.hello()
    client.read_flight()
    said = client.certificate(())
    client.say((said + client.finished(said))[:-1])


def a_hello_of_1_2(channel: SocketChannel, there: Listening) -> None:
    client = tls12.Client(channel)
    client.hello()
    client.read_flight()


def all_but_finished_with_1_2(channel: SocketChannel, there: Listening) -> None:
    client = tls12.Client(channel)
    client.hello()
    client.read_flight()
    client.say(client.certificate(()), client.key_exchange())
    client.change_cipher_spec()


STALLS = {
    one.__name__: one
    for one in (
        nothing,
        one_byte,
        half_a_hello,
        all_but_the_last_byte,
        a_hello,
        a_certificate,
        all_but_finished,
        all_but_a_byte_of_finished,
        a_hello_of_1_2,
        all_but_finished_with_1_2,
    )
}


@pytest.mark.parametrize("name", STALLS)
async def test_a_caller_that_stops_is_cut(there: Listening, name: str) -> None:
    def act(channel: SocketChannel) -> float:
        begun = time.monotonic()
        STALLS[name](channel, there)
        channel.to_end()  # raises TimeoutError where nobody ends it
        return time.monotonic() - begun

    assert await there.attack(act) >= HEAD_TIMEOUT / 2, "it had some time"


def drips(data: bytes, channel: SocketChannel) -> int:
    """Send a byte at a time, far faster than the limit; give how many went before the end came.

    An end for each byte would never come, and all of them take many times the limit.
    """
    channel.sock.settimeout(0.02)
    for sent, byte in enumerate(data):
        channel.send(bytes([byte]))
        try:
            if not channel.receive():
                return sent
        except TimeoutError:
            continue
    raise AssertionError(f"all of {len(data)} bytes were taken, one at a time")


def pieces_of_a_hello(there: Listening, channel: SocketChannel) -> bytes:
    return hello(channel)


def warnings(there: Listening, channel: SocketChannel) -> bytes:
    return tls.record(tls.ALERT, b"\1\x5a") * 500


def pieces_of_a_certificate(there: Listening, channel: SocketChannel) -> bytes:
    """The second flight, once the hello has been answered."""
    client = tls13.Client(channel)
    client.hello()
    client.read_flight()
    sealed = client.sealed(tls.HANDSHAKE, client.certificate(there.good().certificates))
    return sealed[:1_000]


DRIPS = {one.__name__: one for one in (pieces_of_a_hello, warnings, pieces_of_a_certificate)}


@pytest.mark.parametrize("name", DRIPS)
async def test_a_caller_that_drips_is_cut(there: Listening, name: str) -> None:
    def act(channel: SocketChannel) -> int:
        return drips(DRIPS[name](there, channel), channel)

    assert await there.attack(act) > 0


async def test_many_that_never_finish_leave_others_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """While 200 handshakes hang, a good caller is served; then they are gone."""
    environ = {"MESH_HEAD_TIMEOUT": "4s"}
    async with listening(tmp_path_factory.mktemp("slow"), "1.3", **environ) as there:
        with contextlib.ExitStack() as stack:

            def hang() -> None:
                for turn in range(200):
                    channel = stack.enter_context(SocketChannel.to(there.address))
                    channel.send(data[: turn * 10])

            data = Hello(extensions=[tls.extension(21, bytes(4_000))]).record()
            await asyncio.to_thread(hang)
            await eventually(lambda: there.busy() == 200)
            await there.serves()
            await eventually(lambda: there.busy() == 0)


async def test_after_the_handshake_the_time_for_a_head_begins(there: Listening) -> None:
    """A caller that finishes and then says nothing, or half a head, is cut as well."""

    def act(said: bytes) -> Callable[[SocketChannel], bytes]:
        def stop(channel: SocketChannel) -> bytes:
            client = tls13.Client(channel)
            client.handshake(Shown.of(there.kms.issue(CALLER)))
            client.send(tls.APPLICATION_DATA, said)
            while True:
                try:
                    client.read_record()
                except AlertReceived:
                    continue
                except Ended:
                    return client.application_data

        return stop

    assert await there.attack(act(b"GET /secret HTTP/1.1\r\nHost: x\r\n")) == b""

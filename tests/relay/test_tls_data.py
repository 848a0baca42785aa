"""Data over TLS: however it is cut into reads, in both directions, fast and slow."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.identity.conftest import Kms
from tests.identity.conftest import kms as kms
from tests.relay.tls_memory import Both, IdleLoop
from tests.relay.tls_scene import (
    LOOPS,
    MIB,
    SIDES,
    TLS12,
    TLS13,
    VERSIONS,
    Case,
    NewLoop,
    Scene,
    pattern,
)

from dstack_mesh.relay.tls import TlsTransport
from dstack_mesh.relay.worker import READ_BUFFER_BYTES, Worker

BIG = pattern(3 * MIB + 12_345)


# Reads and writes on real connections.


@LOOPS
@VERSIONS
@SIDES
def test_much_goes_both_ways_at_once(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        sending = asyncio.create_task(scene.peer_does(scene.peer.send, BIG))
        await scene.until(lambda: len(scene.protocol.received) == len(BIG))
        await sending
        assert scene.protocol.received == BIG
        scene.ours.write(BIG)
        assert await scene.peer_does(scene.peer.read, len(BIG)) == BIG

    Case(kms, new_loop, version, server_side).run(main)


@LOOPS
@SIDES
def test_many_records_that_are_read_at_once_are_handed_over_at_once(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.ours.pause_reading()
        await scene.peer_does(scene.peer.send, pattern(100_000))
        await asyncio.sleep(0.02)
        assert scene.protocol.pieces == [], "paused"
        scene.ours.resume_reading()
        await scene.until(lambda: len(scene.protocol.received) == 100_000)
        assert len(scene.protocol.pieces) <= 2, scene.protocol.pieces
        assert scene.protocol.received == pattern(100_000)

    Case(kms, new_loop, server_side=server_side).run(main)


@LOOPS
@VERSIONS
@SIDES
def test_bytes_that_drip_are_put_together(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool
) -> None:
    said = [b"a", b"bc" * 20, pattern(300)]

    def drip(scene: Scene) -> None:
        for data in said:
            for byte in scene.peer.seal(data):
                scene.peer.sock.sendall(bytes([byte]))

    async def main(scene: Scene) -> None:
        await scene.meet()
        await scene.peer_does(drip, scene)
        await scene.until(lambda: scene.protocol.received == b"".join(said))

    Case(kms, new_loop, version, server_side).run(main)


@LOOPS
@pytest.mark.parametrize(
    ("version", "server_side"), [(TLS13, True), (TLS12, False)], ids=["server 1.3", "client 1.2"]
)
@pytest.mark.parametrize("size", [1, 16_384, 200_000])
def test_data_in_the_same_read_as_the_end_of_the_handshake_is_not_lost(
    kms: Kms, new_loop: NewLoop, version: ssl.TLSVersion, server_side: bool, size: int
) -> None:
    data = pattern(size)

    async def main(scene: Scene) -> None:
        await scene.meet(lambda: scene.peer.seal(data))
        await scene.until(lambda: len(scene.protocol.received) == size)
        assert scene.protocol.received == data
        scene.ours.write(b"yes")
        assert await scene.peer_does(scene.peer.read, 3) == b"yes"

    Case(kms, new_loop, version, server_side).run(main)


@LOOPS
@pytest.mark.parametrize("how", ["close", "abort"])
def test_data_that_came_with_the_handshake_is_not_for_who_has_closed(
    kms: Kms, new_loop: NewLoop, how: str
) -> None:
    async def main(scene: Scene) -> None:
        scene.protocol.on_made = lambda: getattr(scene.protocol.transport, how)()
        await scene.meet(lambda: scene.peer.seal(b"hello"))
        scene.peer.sock.close()
        await scene.lost()
        assert scene.protocol.events == ["made", "lost"]
        assert scene.protocol.received == b""
        assert scene.settled == [None]

    Case(kms, new_loop).run(main)


@LOOPS
@SIDES
def test_a_reader_that_is_slow_pauses_us_and_resumes(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.ours.set_write_buffer_limits(high=128 * 1024)
        written = 0
        while not scene.protocol.paused:
            scene.ours.write(pattern(60_000))
            written += 1
            await asyncio.sleep(0)
            assert written < 1_000
        assert scene.ours.get_write_buffer_size() > 128 * 1024
        data = await scene.peer_does(scene.peer.read, written * 60_000)
        assert data == pattern(60_000) * written
        await scene.until(lambda: not scene.protocol.paused)
        await scene.until(lambda: scene.ours.get_write_buffer_size() == 0)

    Case(kms, new_loop, server_side=server_side, small=True).run(main)


@LOOPS
@SIDES
def test_what_was_read_before_a_pause_is_all_that_comes(
    kms: Kms, new_loop: NewLoop, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        await scene.meet()
        scene.protocol.on_data = lambda data: scene.protocol.transport.pause_reading()
        sending = asyncio.create_task(scene.peer_does(scene.peer.send, BIG))
        while len(scene.protocol.received) < len(BIG):
            before = len(scene.protocol.received)
            await scene.until(lambda: len(scene.protocol.received) > before)  # noqa: B023 - awaited
            now = len(scene.protocol.received)
            await asyncio.sleep(0.005)
            assert len(scene.protocol.received) == now, "read on"
            assert now - before <= READ_BUFFER_BYTES, "no more than one read"
            scene.ours.resume_reading()
        await sending
        assert scene.protocol.received == BIG

    Case(kms, new_loop, server_side=server_side).run(main)


@LOOPS
def test_what_is_known_of_the_connection_can_be_asked(kms: Kms, new_loop: NewLoop) -> None:
    async def main(scene: Scene) -> None:
        address = scene.peer.sock.getsockname()
        await scene.meet()
        assert scene.ours.get_extra_info("peername") == address
        assert scene.ours.get_extra_info("ssl_object") is scene.ours.ssl_object
        assert isinstance(scene.ours.ssl_object, ssl.SSLObject)
        assert scene.ours.get_extra_info("colour", "none") == "none"
        assert scene.ours.get_extra_info("socket").fileno() > 0
        assert not scene.ours.can_write_eof()
        assert not scene.ours.is_closing()

    Case(kms, new_loop).run(main)


@LOOPS
@pytest.mark.parametrize("size", [1, 100_000], ids=["little", "much"])
@SIDES
def test_a_protocol_that_fails_on_data_ends_the_connection(
    kms: Kms, new_loop: NewLoop, size: int, server_side: bool
) -> None:
    async def main(scene: Scene) -> None:
        def fail(data: bytes) -> None:
            raise ValueError("a fault")

        await scene.meet()
        scene.protocol.on_data = fail
        await scene.peer_does(scene.peer.send, bytes(size))
        assert str(await scene.lost()) == "a fault"
        assert scene.protocol.events == ["made", "lost"]

    Case(kms, new_loop, server_side=server_side).run(main, faults=1)


# Where reads begin and end, in memory: each place that there is.


@VERSIONS
@SIDES
def test_every_cut_gives_the_same_data(
    kms: Kms, version: ssl.TLSVersion, server_side: bool
) -> None:
    said = [b"x", b"", pattern(50), b"yz"]
    both = Both(kms, version, server_side=server_side)
    cut = 0
    while cut <= len(sealed := b"".join(both.seal(data) for data in said)):
        both.say(sealed[:cut], sealed[cut:])
        assert both.take() == b"".join(said)
        cut += 1


@VERSIONS
@SIDES
@pytest.mark.parametrize("last", [1, 5, 300])
def test_every_cut_of_a_handshake_and_what_follows_it_gives_the_same_data(
    kms: Kms, version: ssl.TLSVersion, server_side: bool, last: int
) -> None:
    """The peer's bytes come in pieces of some size, from the first byte of its first flight on."""
    both = Both(kms, version, server_side=server_side, pieces=last)
    assert both.protocol.events == ["made"]
    both.say(both.seal(b"hello"))
    assert both.take() == b"hello"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(
        st.integers(0, 100) | st.integers(16_300, 16_500) | st.integers(0, 120_000), max_size=8
    ),
    cuts=st.lists(st.integers(0, 500_000), max_size=12),
    version=st.sampled_from([TLS12, TLS13]),
    server_side=st.booleans(),
)
def test_any_split_of_a_stream_gives_the_same_plaintext(
    sizes: list[int], cuts: list[int], version: ssl.TLSVersion, server_side: bool
) -> None:
    both = Both(MEMO(), version, server_side=server_side)
    said = [pattern(size) for size in sizes]
    sealed = b"".join(both.seal(data) for data in said)
    edges = [0, *sorted(cut for cut in cuts if cut < len(sealed)), len(sealed)]
    both.say(*(sealed[start:end] for start, end in itertools.pairwise(edges)))
    assert both.take() == b"".join(said)
    both.say(both.goodbye())
    assert both.protocol.events == ["made", "eof"]
    assert both.raw.closed


def _remember(make: Callable[[], Kms]) -> Callable[[], Kms]:
    made: list[Kms] = []

    def give() -> Kms:
        made.extend([] if made else [make()])
        return made[0]

    return give


MEMO = _remember(Kms)
"""One KMS for all examples: a fixture of the session's may not be had where hypothesis runs."""


@pytest.mark.parametrize("size", [READ_BUFFER_BYTES, 3 * READ_BUFFER_BYTES])
def test_what_is_more_than_the_workers_buffer_is_handed_over_in_parts(kms: Kms, size: int) -> None:
    both = Both(kms, TLS13, server_side=True)
    both.say(both.seal(pattern(size)))
    assert both.take() == pattern(size)
    assert max(both.protocol.pieces) <= READ_BUFFER_BYTES
    assert len(both.protocol.pieces) == size // READ_BUFFER_BYTES


@pytest.mark.parametrize("size", [10, READ_BUFFER_BYTES * 2])
@pytest.mark.parametrize("how", ["close", "abort"])
def test_who_closes_gets_nothing_more(kms: Kms, how: str, size: int) -> None:
    """Neither of what came in the same read, nor of what comes later."""
    both = Both(kms, TLS13, server_side=True)
    both.protocol.on_data = lambda data: getattr(both.ours, how)()
    both.say(both.seal(pattern(size)) + both.seal(b"more") + both.goodbye())
    assert len(both.protocol.pieces) == 1
    assert both.protocol.events == ["made"]
    both.ours.data_received(b"anything")
    assert len(both.protocol.pieces) == 1
    both.ours.connection_lost(None)
    assert both.protocol.failure is None, "the peer's end, read over, is no failure"


def test_nothing_more_is_written_once_closed(kms: Kms) -> None:
    both = Both(kms, TLS13, server_side=True)
    both.ours.close()
    sent = bytes(both.raw.sent)
    both.ours.write(b"too late")
    both.ours.close()
    assert both.raw.sent == sent
    both.ours.pause_reading()
    assert both.raw.reading
    both.raw.reading = False
    both.ours.resume_reading()
    assert not both.raw.reading, "it is not the protocol's any more"


def test_a_session_that_is_over_fails_the_writer(kms: Kms) -> None:
    both = Both(kms, TLS13, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        both.ours.ssl_object.unwrap()
    both.ours.write(b"x")
    assert both.raw.closed
    both.ours.connection_lost(None)
    assert isinstance(both.protocol.failure, ssl.SSLError)


def test_a_client_does_not_wait_for_bytes_to_begin_and_a_server_does(kms: Kms) -> None:
    """A caller that has sent nothing costs no session."""
    worker = Worker(IdleLoop(), Case(kms, asyncio.new_event_loop).timeouts)
    for server_side in (False, True):
        both = Both(kms, TLS13, server_side=server_side, worker=worker, shake=False)
        assert (both.ours.ssl_object is None) is server_side
        assert bool(both.raw.sent) is not server_side
    assert isinstance(both.ours, TlsTransport)

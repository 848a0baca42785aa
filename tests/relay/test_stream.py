"""What stands between an event loop and our protocols."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
from tests.relay.tls_scene import LOOPS, NewLoop, tcp_pair

from dstack_mesh.relay.stream import StreamProtocol, left_unread


@pytest.mark.parametrize(
    "call",
    [
        lambda one: one.connection_made(asyncio.Transport()),
        lambda one: one.data_received(b""),
        lambda one: one.eof_received(),
        lambda one: one.connection_lost(None),
        lambda one: one.pause_writing(),
        lambda one: one.resume_writing(),
    ],
)
def test_what_is_left_out_is_an_error(call: Callable[[StreamProtocol], Any]) -> None:
    with pytest.raises(NotImplementedError):
        call(StreamProtocol())


def test_it_gives_itself_and_has_no_dictionary() -> None:
    one = StreamProtocol()
    assert one.as_protocol() is one
    assert StreamProtocol.__dictoffset__ == 0
    assert not isinstance(one, asyncio.BaseProtocol), "or no compiled class could be of it"


class Told(StreamProtocol):
    """Remembers what the event loop called, with what."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.calls: list[tuple[str, object]] = []
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.calls.append(("made", None))

    def data_received(self, data: bytes) -> None:
        self.calls.append(("data", data))

    def eof_received(self) -> bool:
        self.calls.append(("eof", None))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("lost", exc))
        self.ended.set()


async def test_an_event_loop_takes_it_for_a_protocol_of_its_own() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    told = Told()
    await asyncio.get_running_loop().create_connection(told.as_protocol, sock=ours)
    with theirs:
        theirs.sendall(b"abc")
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            await told.ended.wait()
    assert told.calls == [("made", None), ("data", b"abc"), ("eof", None), ("lost", None)]


class LastWords(Told):
    """Remembers what was left unread at the end."""

    left: bytes | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.left = left_unread(self.transport, exc)
        super().connection_lost(exc)


@LOOPS
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "of TLS"])
def test_what_came_before_a_reset_that_a_write_meets_can_still_be_read(
    new_loop: NewLoop, tls: bool
) -> None:
    async def main() -> None:
        ours, theirs = tcp_pair()
        told = LastWords()
        await asyncio.get_running_loop().create_connection(told.as_protocol, sock=ours)
        told.transport.write(b"never read")
        theirs.sendall(b"why")
        theirs.close()  # with something unread: a reset
        told.transport.write(b"met by the reset")
        if tls:
            told.transport = Disguised(told.transport)
        async with asyncio.timeout(10):
            await told.ended.wait()
        assert told.left == (b"" if tls else b"why")
        assert [name for name, _ in told.calls] == ["made", "lost"]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


class Disguised:
    """A transport that says it does TLS."""

    def __init__(self, real: asyncio.Transport) -> None:
        self._real = real

    def get_extra_info(self, name: str) -> object:
        return "a session" if name == "ssl_object" else self._real.get_extra_info(name)


@pytest.mark.parametrize("lost", [None, ValueError("of our own")])
def test_after_any_other_end_nothing_is_read(lost: Exception | None) -> None:
    class NotAsked:
        def get_extra_info(self, name: str) -> object:
            raise AssertionError(name)

    assert left_unread(NotAsked(), lost) == b""


def test_a_transport_without_a_socket_or_with_a_closed_one_has_nothing() -> None:
    with socket.socket() as closed:
        pass
    for sock in (None, closed):
        known = {"socket": sock}

        class Bare:
            def get_extra_info(self, name: str, known: dict[str, object] = known) -> object:
                return known.get(name)

        assert left_unread(Bare(), ConnectionResetError()) == b""

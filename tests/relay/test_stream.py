"""What stands between an event loop and our protocols."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from dstack_mesh.relay.stream import StreamProtocol


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

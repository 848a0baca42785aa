"""So many requests, so many answers, in their order; and behind an upgrade, bytes as they came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.memory_mesh import TARGET_LINE, InboundMesh, MemoryMesh, OutboundMesh
from tests.properties.messages import Message, methods, requests, splits, to_target
from tests.properties.reading import Read, Servers, echo, read_responses

MESHES: list[Callable[[], MemoryMesh]] = [OutboundMesh, InboundMesh]
VERBS = methods | st.just(b"HEAD")

OWN = [
    (Message(b"GET /health HTTP/1.1", ((b"Host", b"h"),)), 200),
    (Message(b"HEAD /health?x HTTP/1.1", ((b"Host", b"h"),)), 200),
]
BAD_TARGET = (
    Message(b"GET / HTTP/1.1", ((b"Host", b"h"), (b"x-dstack-target-port", b"1"))),
    400,
)


@st.composite
def pipelines(draw: st.DrawFn, own: list[tuple[Message, int]]) -> list[tuple[Message, int]]:
    """Requests with the status of their answers: 200 with an echo, or what the mesh says."""
    echoed = requests(persistent=True, verbs=VERBS).map(lambda one: (to_target(one), 0))
    return draw(st.lists(echoed | echoed | st.sampled_from(own), min_size=1, max_size=6))


@pytest.mark.parametrize("make", MESHES)
@given(st.data())
def test_each_request_of_many_has_its_answer(
    make: Callable[[], MemoryMesh], data: st.DataObject
) -> None:
    own = [*OWN, BAD_TARGET] if make is OutboundMesh else OWN
    several = data.draw(pipelines(own))
    pieces = data.draw(splits(b"".join(one.wire for one, _ in several)))
    with make() as mesh:
        servers = Servers(mesh)
        for piece in pieces:
            mesh.client_sends(piece)
            servers.settle()
        verbs = [one.first.split(b" ")[0] for one, _ in several]
        answers = read_responses(mesh.client_received, verbs)
        assert len(answers) == len(several)
        assert len(servers.requests) == sum(not status for _, status in several)
        assert len(mesh.upstreams) <= 1
        assert not mesh.closed
    for (request, status), verb, answer in zip(several, verbs, answers, strict=True):
        assert answer.whole
        assert answer.first[0] == (status or 200)
        if not status:
            target = request.first.split(b" ")[1].removeprefix(b"http://Other.example")
            assert answer.body == (b"" if verb == b"HEAD" else b"%b %b" % (target, request.body))


UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n%b\r\n"
    % TARGET_LINE
)
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def switch(request: Read) -> bytes:
    return SWITCHING if request.all(b"upgrade") else echo(request)


@pytest.mark.parametrize("make", MESHES)
@given(st.lists(requests(persistent=True), max_size=2), st.binary(max_size=40), st.data())
def test_bytes_behind_an_upgrade_are_the_tunnels(
    make: Callable[[], MemoryMesh], before: list[Message], tunnelled: bytes, data: st.DataObject
) -> None:
    before = [to_target(one) for one in before if not one.get(b"upgrade")]
    down = data.draw(st.binary(max_size=40))
    wire = b"".join(one.wire for one in before) + UPGRADE
    pieces = data.draw(splits(wire + tunnelled))
    with make() as mesh:
        servers = Servers(mesh, switch)
        for piece in pieces:
            mesh.client_sends(piece)
            servers.settle()
        mesh.upstream_sends(*data.draw(splits(down)))
        assert servers.readers[-1].switched == tunnelled
        answers, _, received = mesh.client_received.partition(b"HTTP/1.1 101 ")
        assert received.partition(b"\r\n\r\n")[2] == down
        assert len(read_responses(answers, [b"GET"] * len(before))) == len(before)

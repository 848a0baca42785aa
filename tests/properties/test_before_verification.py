"""Not a byte reaches a target before its chain and its app-id are verified, nor ever without."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from tests.memory_mesh import TARGET_LINE, TO_TARGET, OutboundMesh, Shown
from tests.properties.messages import damages, requests, splits, to_target

BAD = [shown for shown in Shown if shown is not Shown.TARGET]
POST = b"POST / HTTP/1.1\r\nHost: h\r\n" + TARGET_LINE + b"Content-Length: 5\r\n\r\n"


@st.composite
def sent(draw: st.DrawFn) -> list[bytes]:
    """Requests to the target, damaged or not, in pieces."""
    several = draw(st.lists(requests().map(to_target), min_size=1, max_size=3))
    wire = b"".join(one.wire for one in several)
    if draw(st.booleans()):
        wire = draw(damages(wire))
    return draw(splits(wire))


@given(sent(), st.lists(st.sampled_from(BAD), min_size=1, max_size=3), st.integers(0, 10))
@example([TO_TARGET, TO_TARGET], [Shown.OTHER_APP], 0)
@example([POST, b"12", b"345", TO_TARGET], [Shown.OTHER_KMS, Shown.OTHER_APP], 1)
def test_nothing_is_sent_to_a_peer_that_is_not_the_target(
    pieces: list[bytes], shown: list[Shown], during: int
) -> None:
    with OutboundMesh() as mesh:
        mesh.client_sends(*pieces[:during])
        assert mesh.targets == []
        for one in shown:
            mesh.verify(one)
        mesh.client_sends(*pieces[during:])
        while mesh.handshaking:
            mesh.verify(shown[-1])
        assert all(server.received == b"" for server in mesh.targets)
        assert all(server.closed and not server.pooled for server in mesh.targets)
        assert mesh.peers.written_before == b""


@given(sent(), st.integers(0, 10))
@example([POST, b"12", b"345", TO_TARGET], 1)
def test_nothing_is_sent_before_the_handshake_is_over_and_all_is_sent_then(
    pieces: list[bytes], during: int
) -> None:
    with OutboundMesh() as mesh:
        mesh.client_sends(*pieces[:during])
        waiting = bool(mesh.handshaking)
        assert mesh.targets == []
        mesh.client_sends(*pieces[during:])
        assert mesh.targets == []
        mesh.verify()
        assert mesh.peers.written_before == b""
        if waiting and len(mesh.codes) == 0:
            (server,) = mesh.targets
            assert server.received


@given(st.lists(st.sampled_from(list(Shown)), min_size=1, max_size=6), st.booleans())
def test_each_connection_is_judged_by_itself(shown: list[Shown], answered: bool) -> None:
    """A connection that dies is replaced by one that is verified in its turn."""
    with OutboundMesh() as mesh:
        for one in shown:
            before = len(mesh.targets)
            mesh.client_sends(TO_TARGET)
            if not mesh.handshaking:  # on the pooled connection, which then dies
                mesh.upstream.breaks()
            assert len(mesh.targets) == before
            server = mesh.verify(one)
            if one is not Shown.TARGET:
                assert server is None or (server.received == b"" and server.closed)
                assert mesh.codes[-1]
                continue
            assert server is not None
            assert server.received == TO_TARGET.replace(TARGET_LINE, b"")
            if answered:
                server.sends(b"HTTP/1.1 204 No Content\r\n\r\n")
                assert server.pooled
            else:
                server.breaks()
        assert mesh.peers.written_before == b""

"""What was forwarded is in its final form: sent through again, it does not change any more.

But for the mesh's own fields, which are of each passage. One read carries it all, since a chunk is
made of what one read brings.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from tests.memory_mesh import TARGET_LINE, TO_TARGET, InboundMesh, MemoryMesh, OutboundMesh
from tests.properties.messages import Message, requests, responses, to_target

OWN_AT = b"x-forwarded-for: "


def out(wire: bytes) -> bytes:
    with OutboundMesh() as mesh:
        mesh.client_sends(wire)
        mesh.verify()
        return mesh.upstream.received


def into(wire: bytes) -> bytes:
    with InboundMesh() as mesh:
        mesh.client_sends(wire)
        return mesh.upstream.received


def without_own_fields(wire: bytes) -> bytes:
    head, blank, body = wire.partition(b"\r\n\r\n")
    start, _, own = head.partition(OWN_AT)
    assert len(own.split(b"\r\n")) == 4
    return start[:-2] + blank + body


@given(requests().map(to_target))
def test_of_requests_on_their_way_out(request: Message) -> None:
    first = out(request.wire)
    line, _, rest = first.partition(b"\r\n")
    assert out(line + b"\r\n" + TARGET_LINE + rest) == first


@given(requests())
def test_of_requests_on_their_way_in(request: Message) -> None:
    first = into(request.wire)
    second = into(first)
    assert without_own_fields(second) == without_own_fields(first)
    assert into(without_own_fields(first)) == first


@pytest.mark.parametrize("make", [OutboundMesh, InboundMesh])
@given(responses())
def test_of_responses(make: Callable[[], MemoryMesh], response: Message) -> None:
    def down(wire: bytes) -> bytes:
        with make() as mesh:
            mesh.client_sends(TO_TARGET)
            if isinstance(mesh, OutboundMesh):
                mesh.verify()
            mesh.upstream_sends(wire)
            mesh.upstream.ends()
            return mesh.client_received

    first = down(response.wire)
    assert first
    second = down(first)
    if not response.get(b"content-length") and not response.chunked:
        # The end of the connection came in a read of its own, and so did the last chunk.
        assert first.endswith(b"0\r\n\r\n")
    assert second == first

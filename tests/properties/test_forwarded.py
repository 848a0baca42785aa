"""What goes on reads, to an independent strict reader, as exactly what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.memory_mesh import (
    CALLER_ADDRESS,
    TARGET,
    TO_TARGET,
    InboundMesh,
    MemoryMesh,
    OutboundMesh,
)
from tests.properties.messages import (
    HOP_BY_HOP,
    TARGET_NAMES,
    Field,
    Message,
    cgi,
    interims,
    requests,
    responses,
    to_target,
)
from tests.properties.reading import Read, read_requests, read_responses

CALLER = CALLER_ADDRESS.encode()
OWN_INBOUND = [
    (b"x-forwarded-for", CALLER),
    (b"x-forwarded-proto", b"https"),
    (b"x-real-ip", CALLER),
    (b"x-dstack-app-id", TARGET.encode()),
]


def members(values: Iterable[bytes]) -> set[bytes]:
    return {part.strip(b" \t").lower() for value in values for part in value.split(b",")}


def end_to_end(message: Message) -> list[Field]:
    """Give the fields that are for the other end, in their order (RFC 9110 7.6.1)."""
    dropped = HOP_BY_HOP | set(TARGET_NAMES) | members(message.get(b"connection"))
    return [field for field in message.fields if field[0].lower() not in dropped]


def meant(message: Message) -> Read:
    """Give what is to go on of a request, but for what one direction adds."""
    method, target, version = message.first.split(b" ")
    kept = end_to_end(message)
    authority = b"Other.example"
    if target.startswith(b"http://"):
        target = target.removeprefix(b"http://" + authority)
        kept = [(b"Host", authority), *(one for one in kept if one[0].lower() != b"host")]
    options = []
    if message.chunked:
        kept.append((b"Transfer-Encoding", b"chunked"))
    if b"trailers" in members(message.get(b"te")):
        kept.append((b"TE", b"trailers"))
        options.append(b"TE")
    upgrade = message.get(b"upgrade")
    if version.endswith(b"1") and upgrade and b"upgrade" in members(message.get(b"connection")):
        kept.append((b"Upgrade", b"websocket, IRC/6.9"))
        options.append(b"Upgrade")
    if options:
        kept.append((b"Connection", b", ".join(options)))
    return Read((method, target), kept, message.body, passing_trailers(message), whole=True)


def passing_trailers(message: Message) -> list[Field]:
    """Give the trailers that `Connection` does not keep back."""
    kept_back = {cgi(name) for name in members(message.get(b"connection"))}
    return [field for field in message.trailers if cgi(field[0]) not in kept_back]


def forwarded(mesh: MemoryMesh, wire: bytes) -> bytes:
    mesh.client_sends(wire)
    if isinstance(mesh, OutboundMesh):
        mesh.verify()
    assert len(mesh.upstreams) == 1
    return mesh.upstream.received


@given(requests().map(to_target))
def test_a_request_on_its_way_out(request: Message) -> None:
    with OutboundMesh() as mesh:
        assert read_requests(forwarded(mesh, request.wire)) == [meant(request)]


@given(requests())
def test_a_request_on_its_way_in(request: Message) -> None:
    expected = meant(request)
    expected.fields += OWN_INBOUND
    with InboundMesh() as mesh:
        assert read_requests(forwarded(mesh, request.wire)) == [expected]


@given(requests().map(to_target))
def test_a_request_through_two_meshes(request: Message) -> None:
    expected = meant(request)
    expected.fields += OWN_INBOUND
    with OutboundMesh() as ours, InboundMesh() as theirs:
        wire = forwarded(theirs, forwarded(ours, request.wire))
    (read,) = read_requests(wire)
    assert sorted(read.fields) == sorted(expected.fields)
    assert (read.first, read.body, read.trailers) == (
        expected.first,
        expected.body,
        expected.trailers,
    )


@pytest.mark.parametrize("make", [OutboundMesh, InboundMesh])
@given(interims, responses(), st.booleans())
def test_a_response(
    make: Callable[[], MemoryMesh], before: list[Message], response: Message, last: bool
) -> None:
    request = TO_TARGET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    rest = response.first.partition(b" ")[2]
    expected = end_to_end(response)
    declared = response.get(b"content-length")
    if not declared:
        expected.append((b"Transfer-Encoding", b"chunked"))
    if last:
        expected.append((b"Connection", b"close"))
    with make() as mesh:
        forwarded(mesh, request if last else TO_TARGET)
        mesh.upstream_sends(*(one.wire for one in before), response.wire)
        mesh.upstream.ends()
        (read,) = read_responses(mesh.client_received, [b"GET"])
        assert mesh.closed == last
    status, _, reason = rest.partition(b" ")
    assert read.first == (int(status), reason.lstrip(b" \t"))
    assert read.fields == expected
    trailers = passing_trailers(response)
    assert (read.body, read.trailers, read.whole) == (response.body, trailers, True)
    assert read.interim == [(int(one.first.split(b" ")[1]), end_to_end(one)) for one in before]


@pytest.mark.parametrize("make", [OutboundMesh, InboundMesh])
@given(responses(), st.integers(0, 2000))
def test_a_response_that_breaks_off_is_never_whole(
    make: Callable[[], MemoryMesh], response: Message, drawn: int
) -> None:
    to_the_end = not response.chunked and not response.get(b"content-length")
    wire = response.wire[: drawn % (len(response.wire) + to_the_end)]
    with make() as mesh:
        forwarded(mesh, TO_TARGET)
        mesh.upstream_sends(wire)
        empty = mesh.codes == [""]  # a length of 0 is whole with its head
        mesh.upstream.breaks()
        found = read_responses(mesh.client_received, [b"GET"], ended=not mesh.client.cut)
    assert empty or mesh.codes == ["upstream_closed"]
    for read in found:
        assert read.whole == (empty or read.error == "upstream_closed")
    assert found or mesh.client.cut

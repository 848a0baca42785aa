"""A message that two readers could read differently is refused, whatever else stands in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.memory_mesh import TO_TARGET, InboundMesh, MemoryMesh, OutboundMesh
from tests.properties.messages import Message, requests, responses, splits, to_target
from tests.properties.reading import read_responses

MESHES: list[Callable[[], MemoryMesh]] = [OutboundMesh, InboundMesh]

IN_ANY = [
    *(
        b"Content-Length : 0",
        b"Content-Length\t: 0",
        b" folded: 1",
        b"\tfolded",
        b"no colon",
        b": x",
    ),
    *(b"a b: 1", b"a\0b: 1", b"a: \0", b"a: \x0b", b"a: 1\rb: 2", b"a: 1\nb: 2", b"a(b): 1"),
    *(b"Content-Length: +5", b"Content-Length: -0", b"Content-Length: 0x5", b"Content-Length: 5,5"),
    *(b"Content-Length: ", b"Content-Length: 5 5", b"Content-Length: 9999999999999999999"),
    *(b"Transfer-Encoding: identity", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: "),
    *(b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: chunked;q=1"),
    *(b"Transfer-Encoding: xchunked", b'Transfer-Encoding: "chunked"'),
    *(b"Connection: content-length", b"Connection: close, Host"),
]
"""Lines that make any head one to refuse."""

IN_REQUESTS = [
    *(b"Host: other", b"host: h", b"Host:", b"Hos\xe9t: x"),
    *(b"Content_Length: 0", b"transfer_encoding: chunked", b"Transfer.Encoding: chunked"),
    *(b"content~length: 1", b"HOST : h"),
]
IN_FRAMED = [b"Content-Length: 1", b"Transfer-Encoding: chunked"]
"""Each is one length too many where there is another."""


@st.composite
def made_ambiguous(draw: st.DrawFn, message: Message, lines: list[bytes]) -> list[bytes]:
    """The head of `message` with a bad line among its lines, then its body, in pieces."""
    framed = message.get(b"content-length") or message.chunked
    line = draw(st.sampled_from([*lines, *(IN_FRAMED if framed else [])]))
    start, *fields = message.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    at = draw(st.integers(0, len(fields)))
    head = b"\r\n".join([start, *fields[:at], line, *fields[at:]]) + b"\r\n\r\n"
    return draw(splits(head + message.wire[len(message.head) :]))


@pytest.mark.parametrize("make", MESHES)
@given(requests().map(to_target).flatmap(lambda one: made_ambiguous(one, [*IN_ANY, *IN_REQUESTS])))
def test_a_request(make: Callable[[], MemoryMesh], pieces: list[bytes]) -> None:
    with make() as mesh:
        mesh.client_sends(*pieces)
        if isinstance(mesh, OutboundMesh):
            assert not mesh.handshaking
        assert mesh.upstreams == []
        (answer,) = read_responses(mesh.client_received, [b"GET"])
        assert (answer.first[0], answer.error) == (400, "bad_request")
        assert answer.all(b"connection") == [b"close"]
        received = len(mesh.client_received)
        mesh.client_sends(TO_TARGET)
        assert mesh.upstreams == []
        assert len(mesh.client_received) == received


@pytest.mark.parametrize("make", MESHES)
@given(responses().flatmap(lambda one: made_ambiguous(one, IN_ANY)))
def test_a_response(make: Callable[[], MemoryMesh], pieces: list[bytes]) -> None:
    with make() as mesh:
        mesh.client_sends(TO_TARGET)
        if isinstance(mesh, OutboundMesh):
            mesh.verify()
        mesh.upstream_sends(*pieces)
        (answer,) = read_responses(mesh.client_received, [b"GET"])
        assert (answer.first[0], answer.error) == (502, "upstream_protocol_error")
        assert mesh.upstream.closed
        assert not mesh.upstream.pooled
        assert not mesh.closed

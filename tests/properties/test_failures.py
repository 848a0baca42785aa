"""Whatever comes, it fails as the project's errors say, and what failed is not used again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.memory_mesh import TO_TARGET, InboundMesh, MemoryMesh, OutboundMesh
from tests.properties.messages import (
    BAD_TOKENS,
    Message,
    damages,
    requests,
    responses,
    splits,
    to_target,
)
from tests.properties.reading import read_responses

from dstack_mesh import errors
from dstack_mesh.errors import MeshError
from dstack_mesh.outbound.agent_calls import agent_path
from dstack_mesh.relay.answers import find_request_id
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.wire.body import ChunkedDecoder
from dstack_mesh.wire.fields import MalformedError, forwardable_trailers
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import parse_request_line
from dstack_mesh.wire.response import parse_response_fields, parse_status_line
from dstack_mesh.wire.translate import Response, ResponseRules

MESHES: list[Callable[[], MemoryMesh]] = [OutboundMesh, InboundMesh]
CODES = {
    one.code for one in vars(errors).values() if isinstance(one, type) and hasattr(one, "code")
}
NOT_HTTP = {"bad_request", "uri_too_long", "header_too_large"}
LINGER = Timeouts().linger + 2 * Timeouts().tick()

mixtures = st.lists(
    st.sampled_from(BAD_TOKENS) | st.binary(max_size=8) | st.just(TO_TARGET[:20]), max_size=8
).map(b"".join)


def damaged(of: st.SearchStrategy[Message]) -> st.SearchStrategy[list[bytes]]:
    return (of.map(lambda one: one.wire).flatmap(damages) | mixtures).flatmap(splits)


@pytest.mark.parametrize("make", MESHES)
@given(damaged(requests().map(to_target)), st.booleans())
def test_a_client_may_send_anything(
    make: Callable[[], MemoryMesh], pieces: list[bytes], leaves: bool
) -> None:
    with make() as mesh:
        mesh.client_sends(*pieces)
        if isinstance(mesh, OutboundMesh):
            mesh.verify()
        if leaves:
            mesh.client.ends()
        answers = read_responses(mesh.client_received, [b"GET"] * 20)
        assert all(one.whole and (not one.error or one.error in CODES) for one in answers)
        assert set(mesh.codes) <= CODES | {""}
        mesh.pass_time(LINGER)
        if answers and answers[-1].error in NOT_HTTP:
            assert mesh.client.transport.is_closing()
            assert all(server.closed and not server.pooled for server in mesh.upstreams)
        mesh.client.breaks()
        assert not mesh.service.connections
        assert all(server.closed != server.pooled for server in mesh.upstreams)
        mesh.pass_time(Timeouts().idle)
        assert not mesh.worker.upstreams


@pytest.mark.parametrize("make", MESHES)
@given(damaged(responses()), st.sampled_from(["", "ends", "breaks"]))
def test_a_server_may_answer_anything(
    make: Callable[[], MemoryMesh], pieces: list[bytes], end: str
) -> None:
    with make() as mesh:
        mesh.client_sends(TO_TARGET)
        if isinstance(mesh, OutboundMesh):
            mesh.verify()
        server = mesh.upstream
        server.sends(*pieces)
        if end:
            getattr(server, end)()
        assert set(mesh.codes) <= {"", "upstream_protocol_error", "upstream_closed"}
        if any(mesh.codes) or end:
            assert server.closed
            assert not server.pooled
        ended = mesh.closed and not mesh.client.cut
        answers = read_responses(mesh.client_received, [b"GET"], ended=ended)
        if any(mesh.codes):
            assert not answers[0].whole or answers[0].error == mesh.codes[0]
            assert answers[0].whole or mesh.client.cut
        mesh.pass_time(Timeouts().idle + Timeouts().response)
        assert not mesh.records or mesh.closed


@given(mixtures | requests().map(lambda one: one.wire).flatmap(damages), st.integers(0, 1))
def test_heads_and_bodies_of_any_bytes(data: bytes, minor: int) -> None:
    remove = frozenset((b"x-own",))
    line, _, block = data.partition(b"\r\n")
    block = block.partition(b"\r\n\r\n")[0] + b"\r\n"

    def feed_body() -> None:
        ChunkedDecoder(remove).feed(data)

    def feed_response() -> None:
        Response(b"GET", minor, b"", ResponseRules(remote_errors=True)).feed(data)

    checks: list[tuple[Callable[[], object], type[Exception]]] = [
        (lambda: parse_request_line(line), MeshError),
        (lambda: parse_request_fields(block, minor, remove), MeshError),
        (lambda: parse_status_line(line), MeshError),
        (lambda: parse_response_fields(block, minor, remove), MeshError),
        (lambda: forwardable_trailers(block, remove), MalformedError),
        (feed_body, MalformedError),
        (feed_response, MeshError),
    ]
    for check, refusal in checks:
        with contextlib.suppress(refusal):  # and nothing else comes through
            check()
    assert len(find_request_id(data)) <= 200
    assert agent_path(line).count(b"/") == line.count(b"/")


@given(
    st.text('0019afAFgGxX_+-. ;=\t\r\v"\xe9', max_size=20).map(lambda text: text.encode("latin-1"))
)
def test_a_chunk_line_is_a_size_and_extensions_or_refused(line: bytes) -> None:
    decoder = ChunkedDecoder(frozenset())
    valid = re.fullmatch(rb"([0-9a-fA-F]{1,16})([ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?", line)
    try:
        decoder.feed(line + b"\r\n\r\n")
    except MalformedError:
        # A zero size ends the body there; any other wants its bytes, and two of them are there.
        assert not valid or int(valid[1], 16) in (1, 2)
    else:
        assert valid
        assert decoder.done == (int(valid[1], 16) == 0)

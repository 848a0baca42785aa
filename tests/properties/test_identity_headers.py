"""Whatever a peer calls its fields, a backend finds the mesh's own identity headers and no other.

The backend is a lenient one: like CGI and its kin it makes a variable of a field's name, in upper
case and with `_` for all that is neither letter nor digit, and so takes many names for one.
"""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from tests.memory_mesh import CALLER_ADDRESS, OTHER, TARGET, TO_TARGET, InboundMesh, OutboundMesh
from tests.properties.messages import (
    IDENTITY_NAMES,
    STRIPPED_INBOUND,
    TARGET_NAMES,
    TOKEN_SYMBOLS,
    Chunked,
    Field,
    Message,
    bodies,
    cgi,
    requests,
    splits,
    to_target,
)
from tests.properties.reading import read_requests, read_responses

CALLER = CALLER_ADDRESS.encode()
FORGED = st.sampled_from([OTHER.encode(), TARGET.encode(), b"1", b"", b"a, b", b"198.51.100.9"])


@st.composite
def spellings(draw: st.DrawFn, of: tuple[bytes, ...]) -> bytes:
    """Names that a lenient backend takes for one of `of`."""
    name = draw(st.sampled_from(of)).decode()
    separators = st.just("-") | st.just("_") | st.sampled_from(TOKEN_SYMBOLS)
    spelled = "".join(draw(separators) if char == "-" else char for char in name)
    upper = draw(st.sampled_from([0, (1 << len(name)) - 1]) | st.integers(0, (1 << len(name)) - 1))
    return "".join(
        char.upper() if upper >> at & 1 else char for at, char in enumerate(spelled)
    ).encode()


@st.composite
def forged(draw: st.DrawFn, of: tuple[bytes, ...], *, exact: bool = True) -> list[Field]:
    """Fields under such names, some of them said to be of the connection only."""
    names = spellings(of)
    if not exact:
        names = names.filter(lambda name: name.lower() not in of)
    lines = draw(st.lists(st.tuples(names, FORGED), min_size=1, max_size=5))
    if draw(st.booleans()):
        nominated = draw(st.lists(names, min_size=1, max_size=3))
        lines.append((b"Connection", b", ".join([*nominated, b"keep-alive"])))
    return lines


@st.composite
def in_trailers(draw: st.DrawFn, of: tuple[bytes, ...], message: Message) -> Message:
    """Give `message` a chunked body, with such fields behind it too."""
    lines = tuple(draw(st.lists(st.tuples(spellings(of), FORGED), max_size=4)))
    body = draw(bodies)
    fields = tuple(
        field
        for field in message.fields
        if field[0].lower() not in (b"content-length", b"transfer-encoding")
    )
    chunked = Chunked((body,) if body else (), trailers=lines)
    return Message(
        message.first.replace(b"HTTP/1.0", b"HTTP/1.1"),
        (*fields, (b"Transfer-Encoding", b"chunked")),
        body,
        chunked,
    )


def taken_for(name: bytes, fields: list[Field]) -> list[bytes]:
    return [value for key, value in fields if cgi(key) == cgi(name)]


@given(
    requests(extra=forged(STRIPPED_INBOUND)).flatmap(
        lambda one: st.just(one) | in_trailers(STRIPPED_INBOUND, one)
    ),
    st.sampled_from([TARGET, OTHER]),
    st.data(),
)
def test_a_backend_finds_the_verified_caller_and_nobody_else(
    request: Message, caller: str, data: st.DataObject
) -> None:
    pieces = data.draw(splits(request.wire))
    with InboundMesh(caller_app_id=caller) as mesh:  # type: ignore[arg-type]
        mesh.client_sends(*pieces)
        (read,) = read_requests(mesh.upstream.received)
    assert taken_for(b"x-dstack-app-id", read.fields) == [caller.encode()]
    assert taken_for(b"x-real-ip", read.fields) == [CALLER]
    assert taken_for(b"x-forwarded-proto", read.fields) == [b"https"]
    said = [value for key, value in request.fields if key.lower() == b"x-forwarded-for" and value]
    assert taken_for(b"x-forwarded-for", read.fields) == [b", ".join([*said, CALLER])]
    for name in (b"x-client-cert", b"x-client-verify"):
        assert taken_for(name, read.fields) == []
    for name in STRIPPED_INBOUND:
        assert taken_for(name, read.trailers) == []
    assert read.body == request.body


@given(
    requests(extra=forged(TARGET_NAMES, exact=False)).flatmap(
        lambda one: st.just(one) | in_trailers(TARGET_NAMES, one)
    ),
    st.booleans(),
)
def test_the_target_headers_never_leave(request: Message, mesh_bound: bool) -> None:
    """Not to a target, and not to the guest agent either."""
    with OutboundMesh() as mesh:
        mesh.client_sends((to_target(request) if mesh_bound else request).wire)
        mesh.verify()
        assert (len(mesh.targets), len(mesh.agents)) == ((1, 0) if mesh_bound else (0, 1))
        (read,) = read_requests(mesh.upstream.received)
    for name in TARGET_NAMES:
        assert taken_for(name, read.fields) == []
        assert taken_for(name, read.trailers) == []


@given(requests(extra=forged((*IDENTITY_NAMES, *TARGET_NAMES), exact=False)).map(to_target))
def test_a_request_through_two_meshes_has_its_callers_identity(request: Message) -> None:
    with OutboundMesh() as ours, InboundMesh() as theirs:
        ours.client_sends(request.wire)
        ours.verify()
        theirs.client_sends(ours.upstream.received)
        (read,) = read_requests(theirs.upstream.received)
    assert taken_for(b"x-dstack-app-id", read.fields) == [TARGET.encode()]
    assert taken_for(b"x-real-ip", read.fields) == [CALLER]
    assert taken_for(b"x-forwarded-proto", read.fields) == [b"https"]


ERROR = (b"x-dstack-mesh-error",)


@given(forged(ERROR), st.lists(st.tuples(spellings(ERROR), FORGED), max_size=3))
def test_no_answer_passes_for_one_of_the_meshs_own(
    lines: list[Field], trailers: list[Field]
) -> None:
    body = Chunked((b"body",), trailers=tuple(trailers))
    answer = Message(
        b"HTTP/1.1 502 Bad Gateway",
        (*lines, (b"Transfer-Encoding", b"chunked")),
        b"body",
        body,
    )
    for make in (OutboundMesh, InboundMesh):
        with make() as mesh:
            mesh.client_sends(TO_TARGET)
            if isinstance(mesh, OutboundMesh):
                mesh.verify()
            mesh.upstream_sends(answer.wire)
            (read,) = read_responses(mesh.client_received, [b"GET"])
        found = taken_for(ERROR[0], read.fields)
        remote = [
            value + b"; remote"
            for key, value in lines
            if key.lower() == ERROR[0] and re.fullmatch(rb"[a-z_]+", value)
        ]
        assert found == (remote if make is OutboundMesh else [])
        assert taken_for(ERROR[0], read.trailers) == []
        assert read.whole

"""However bytes are split into reads, the same is understood, forwarded and answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.memory_mesh import TO_TARGET, InboundMesh, MemoryMesh, OutboundMesh
from tests.properties.messages import (
    Message,
    bodies,
    chunkings,
    damages,
    interims,
    requests,
    responses,
    splits,
    to_target,
)
from tests.properties.reading import Read, Servers, read_responses, without_details

from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.wire.body import ChunkedDecoder
from dstack_mesh.wire.fields import MalformedError

MESHES: list[Callable[[], MemoryMesh]] = [OutboundMesh, InboundMesh]
LINGER = Timeouts().linger + 2 * Timeouts().tick()
"""Seconds after which the mesh has closed what it had refused, and nothing else."""


@st.composite
def sequences(draw: st.DrawFn, *, damaged: bool) -> tuple[bytes, list[bytes]]:
    """One to three requests on one connection, and a split of them."""
    several = draw(st.lists(requests(persistent=True).map(to_target), max_size=2))
    wire = b"".join(one.wire for one in [*several, to_target(draw(requests()))])
    if damaged:
        wire = draw(damages(wire))
    return wire, draw(splits(wire))


@dataclass
class Up:
    """What became of a client's bytes."""

    requests: list[object]
    partial: list[Read]
    answers: list[object]
    closed: bool


def carry_up(make: Callable[[], MemoryMesh], pieces: list[bytes], *, at_once: bool = False) -> Up:
    with make() as mesh:
        servers = Servers(mesh)
        if at_once:
            mesh.client.sends_at_once(*pieces)
            servers.settle()
        for piece in [] if at_once else pieces:
            mesh.client_sends(piece)
            servers.settle()
        mesh.pass_time(LINGER)
        answers = read_responses(mesh.client_received, [b"GET"] * 20)
        return Up(
            [(one.first, one.fields, one.body, one.trailers) for one in servers.requests],
            servers.partial,
            [without_details(one) for one in answers],
            mesh.closed,
        )


def same_beginning(one: list[Read], other: list[Read]) -> bool:
    """Tell whether what was sent of a request that failed is the beginning of one request."""
    return all(
        (a.first, a.fields) == (b.first, b.fields)
        and (a.body.startswith(b.body) or b.body.startswith(a.body))
        for a, b in zip(one, other, strict=False)
    )


def assert_same(whole: Up, parts: Up) -> None:
    shorter, longer = sorted((whole, parts), key=lambda up: len(up.answers))
    if len(shorter.answers) != len(longer.answers):
        # A refused body costs its connection unless it was there whole: only what follows differs.
        assert shorter.answers[-1] == (400, "bad_target")
        assert shorter.closed
        assert longer.answers[: len(shorter.answers)] == shorter.answers
        assert longer.requests[: len(shorter.requests)] == shorter.requests
        return
    assert parts.requests == whole.requests
    assert parts.answers == whole.answers
    if whole.answers[-1:] != [(400, "bad_target")]:
        assert parts.closed == whole.closed
    if whole.closed:
        assert same_beginning(whole.partial, parts.partial)
    else:
        assert parts.partial == whole.partial


@pytest.mark.parametrize("make", MESHES)
@given(sequences(damaged=False))
def test_valid_requests(
    make: Callable[[], MemoryMesh], sequence: tuple[bytes, list[bytes]]
) -> None:
    wire, pieces = sequence
    whole = carry_up(make, [wire])
    assert whole.requests
    assert not whole.partial
    assert len(whole.requests) == len(whole.answers)
    assert_same(whole, carry_up(make, pieces))
    assert_same(whole, carry_up(make, pieces, at_once=True))


@pytest.mark.parametrize("make", MESHES)
@given(sequences(damaged=True))
def test_damaged_requests(
    make: Callable[[], MemoryMesh], sequence: tuple[bytes, list[bytes]]
) -> None:
    wire, pieces = sequence
    whole = carry_up(make, [wire])
    assert_same(whole, carry_up(make, pieces))
    assert_same(whole, carry_up(make, pieces, at_once=True))


@dataclass
class Down:
    """What became of a server's bytes."""

    answer: Read | None
    """None where the client got an error of the mesh's own, or nothing yet."""
    error: str
    closed: bool
    upstream_closed: bool
    recorded: str

    @property
    def failed(self) -> bool:
        return bool(self.error or self.recorded)


ENDS = st.sampled_from(["open", "in order", "reset"])


def carry_down(
    make: Callable[[], MemoryMesh], request: bytes, pieces: list[bytes], end: str, *, at_once: bool
) -> Down:
    with make() as mesh:
        mesh.client_sends(request)
        if isinstance(mesh, OutboundMesh):
            mesh.verify()
        if at_once:
            mesh.upstream.sends_at_once(*pieces)
        else:
            mesh.upstream_sends(*pieces)
        if end == "in order":
            mesh.upstream.ends()
        elif end == "reset":
            mesh.upstream.breaks()
        mesh.pass_time(LINGER)
        ended = mesh.closed and not mesh.client.cut
        found = read_responses(mesh.client_received, [b"GET"], ended=ended)
        answer = found[0] if found else None
        code = answer.error if answer and b"; remote" not in answer.error.encode() else ""
        recorded = "".join(mesh.codes)
        assert not code or code == recorded
        return Down(None if code else answer, code, mesh.closed, mesh.upstream.closed, recorded)


def assert_same_answer(whole: Down, parts: Down) -> None:
    assert parts.upstream_closed == whole.upstream_closed
    assert parts.failed == whole.failed
    if not whole.failed:
        assert parts == whole
        return
    assert parts.recorded == whole.recorded
    for down in (whole, parts):
        # Told by an error of the mesh's own, or to be seen by its missing end: nothing between.
        assert bool(down.error) != bool(down.answer and not down.answer.whole)
        assert down.upstream_closed
        assert down.closed or down.error
    if whole.answer and parts.answer:
        assert same_beginning([whole.answer], [parts.answer])


EXCESS = st.sampled_from([b"", b"\r\n", b"x", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
"""What may follow an answer that it does not belong to."""


@st.composite
def answers(draw: st.DrawFn, *, damaged: bool) -> tuple[bytes, list[bytes]]:
    parts: list[Message] = [*draw(interims), draw(responses())]
    wire = b"".join(one.wire for one in parts)
    if damaged:
        wire = draw(st.just(wire) | damages(wire)) + draw(EXCESS)
    return wire, draw(splits(wire))


@pytest.mark.parametrize("make", MESHES)
@given(answers(damaged=False), ENDS, st.booleans())
def test_valid_responses(
    make: Callable[[], MemoryMesh], answer: tuple[bytes, list[bytes]], end: str, old: bool
) -> None:
    wire, pieces = answer
    request = TO_TARGET.replace(b"HTTP/1.1", b"HTTP/1.0") if old else TO_TARGET
    whole = carry_down(make, request, [wire], end, at_once=False)
    assert not whole.error
    for at_once in (False, True):
        assert_same_answer(whole, carry_down(make, request, pieces, end, at_once=at_once))


@pytest.mark.parametrize("make", MESHES)
@given(answers(damaged=True), ENDS)
def test_damaged_responses(
    make: Callable[[], MemoryMesh], answer: tuple[bytes, list[bytes]], end: str
) -> None:
    wire, pieces = answer
    whole = carry_down(make, TO_TARGET, [wire], end, at_once=False)
    for at_once in (False, True):
        assert_same_answer(whole, carry_down(make, TO_TARGET, pieces, end, at_once=at_once))


@dataclass
class Decoded:
    payload: bytes
    taken: int
    trailers: bytes
    done: bool
    failed: str = ""


def decode(pieces: list[bytes]) -> Decoded:
    decoder = ChunkedDecoder(frozenset((b"x-own",)))
    found = Decoded(b"", 0, b"", False)
    try:
        for piece in pieces:
            payload, taken = decoder.feed(piece)
            found.payload += bytes(payload)
            found.taken += taken
            if decoder.done:
                break
            assert taken == len(piece)
    except MalformedError as error:
        found.failed = f"{type(error).__name__}: {error}"
    found.trailers, found.done = decoder.trailers, decoder.done
    return found


@st.composite
def chunked_bodies(draw: st.DrawFn, *, damaged: bool) -> tuple[bytes, list[bytes]]:
    wire = draw(bodies.flatmap(chunkings)).wire
    if damaged:
        wire = draw(damages(wire))
    wire += draw(st.sampled_from([b"", b"GET / HTTP/1.1\r\n\r\n"]))
    return wire, draw(splits(wire))


@given(chunked_bodies(damaged=True) | chunked_bodies(damaged=False))
def test_chunked_bodies(body: tuple[bytes, list[bytes]]) -> None:
    wire, pieces = body
    whole, parts = decode([wire]), decode(pieces)
    assert parts.failed == whole.failed
    if whole.failed:
        whole.payload, whole.taken = parts.payload, parts.taken  # what came before the damage
    assert parts == whole

"""Response bodies: any split of the stream gives a client the same, heads included."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import h11

from dstack_mesh.errors import UpstreamProtocolError
from dstack_mesh.wire import translate
from fuzz.program import Program, split
from fuzz.reader import Message, h11_is_stricter, has_bare_lf, read_responses
from fuzz.rules import check_trailers

_REMOVE = frozenset((b"x-dstack-mesh-error",))
_HEADS = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n",
)

# Flags, a length, four strides, and the body's stream.
SEEDS = (
    b"\x00\x00\x01\x00\x00\x005\r\nhello\r\n0\r\n\r\n",
    b"\x04\x00\x04\x00\x00\x002\r\nok\r\n0\r\nX-A: 1\r\n\r\n",
    b"\x00\x00\x09\x04\x00\x001\r\nab\r\n",
    b"\x00\x00\x00\x00\x00\x000\r\nX-Dstack-Mesh-Error: 1\r\nETag: 2\r\nHost: a\r\n\r\nHTTP/1.1",
    b"\x01\x04\x01\x02\x03\x04hello",
    b"\x01\x04\x30\x00\x00\x00hello and more",
    b"\x02\x00\x05\x00\x00\x00until the end",
    b"\x06\x00\x05\x00\x00\x00until the end",
    b"\x0a\x00\x05\x00\x00\x00until it breaks",
    b"\x03\x01\x07\x00\x00\x00ok",
)


@dataclass
class Passed:
    """What became of one way of cutting a stream."""

    out: bytes = b""
    status: int = 0
    done: bool = False
    pooled: bool = False
    """Whether the upstream's connection goes back to the pool, and stays there."""
    refused: bool = False
    broken: bool = False
    """Whether the connection ended before the body did."""
    closes: bool = False
    """Whether the client's connection is to be closed behind the answer."""


def run(data: bytes) -> None:
    program = Program(data)
    flags, length = program.byte(), program.byte()
    strides = program.take(4)
    head = _HEADS[flags & 3]
    stream = (head % (length + 1) if b"%" in head else head) + program.rest()
    minor = 0 if flags & 4 else 1
    clean = not flags & 8

    whole = _feed([stream], minor, clean=clean)
    parts = _feed(split(stream, strides), minor, clean=clean)
    assert whole.refused == parts.refused, "refused in one piece, or in several, but not in both"
    got = _final(parts.out, closed=parts.closes and parts.done)
    _check_came(stream, clean, parts, got)
    if whole.refused:
        assert got is None or not got.complete, "a body that was refused arrives as if whole"
        return
    if whole.out != parts.out:  # the chunks are cut otherwise
        assert got == _final(whole.out, closed=whole.closes and whole.done)
    whole.out = parts.out = b""
    assert whole == parts


def _feed(pieces: Iterable[bytes], minor: int, *, clean: bool) -> Passed:
    passed = Passed()
    rules = translate.ResponseRules(remote_errors=True)
    response = translate.Response(b"GET", minor, b"", rules)
    response.keep_client = bool(minor)
    try:
        for piece in pieces:
            if response.done:  # nobody asked for this: an idle connection is cut by it
                response.keep_upstream = False
                break
            passed.out += response.feed(piece)
    except UpstreamProtocolError as error:
        assert error.detail.isprintable(), error.detail
        passed.refused = True
    else:
        passed.pooled = response.done and response.keep_upstream
        if not response.done:
            tail = response.end(clean)
            passed.out += tail or b""
            passed.broken = tail is None
    passed.status = response.status
    passed.done = response.done and not passed.refused
    passed.closes = not response.keep_client
    return passed


def _final(out: bytes, *, closed: bool) -> Message | None:
    read = read_responses(out, [b"GET"], closed=closed)
    assert not read.rest, f"bytes behind the answer: {read.rest!r}"
    if not read.messages or read.messages[-1].first[0] < b"200":
        return None
    return read.messages[-1]


def _check_came(stream: bytes, clean: bool, passed: Passed, got: Message | None) -> None:
    """Hold what the client gets against what h11 finds in what came."""
    try:
        read = read_responses(stream, [b"GET"])
        if clean and not passed.refused and not read.messages[-1].complete and not passed.broken:
            read = read_responses(stream, [b"GET"], closed=True)
    except h11.RemoteProtocolError as error:
        undecided = not passed.done and has_bare_lf(stream)
        assert passed.refused or undecided or h11_is_stricter(error), error
        return
    came = read.messages[-1]
    assert got is None or came.body.startswith(got.body), "a payload that did not come"
    if passed.refused or (not passed.done and has_bare_lf(stream)):
        return
    assert got is not None
    assert got.body == came.body
    assert got.complete == came.complete == passed.done
    assert not (passed.pooled and (read.rest or not came.complete)), "pooled with bytes to come"
    if passed.done and not passed.closes:
        check_trailers(got.trailers, came.trailers, _REMOVE)

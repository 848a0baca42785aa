"""Request bodies: any split gives the same, and h11 reads the same in what goes on."""

from __future__ import annotations

from dataclasses import dataclass

import h11

from dstack_mesh.wire import translate
from dstack_mesh.wire.fields import MalformedError
from dstack_mesh.wire.request import RequestFields, parse_request_fields
from fuzz.program import Program, split
from fuzz.reader import Message, h11_is_stricter, has_bare_lf, read_requests
from fuzz.rules import check_trailers

REMOVE = frozenset((b"x-own",))
_LINE = b"POST / HTTP/1.1\r\n"

# A flag, a length, four strides, and the stream.
SEEDS = (
    b"\x01\x00\x05\x00\x00\x001;" + b"x" * 1022 + b"\r\na\r\n0\r\n\r\n",
    b"\x01\x00\xff\x00\x00\x001;" + b"x" * 1024 + b"\r\na\r\n0\r\n\r\n",
    b"\x01\x00\x00\x00\x00\x000\r\n" + b"A:\r\n" * 129 + b"\r\n",
    b"\x01\x00\x00\x00\x00\x000\r\nX-A: 1 \r\nX-B: \0\r\n\r\n",
    b"\x00\x05\x01\x00\x00\x00helloGET / HTTP/1.1\r\n",
    b"\x01\x00\x01\x00\x00\x005\r\nhello\r\n0\r\n\r\n",
    b"\x01\x00\x03\x02\x07\x00a;x=1\r\n0123456789\r\n000\r\nX-A: 1\r\nX-Own: 2\r\n\r\nGET",
    b"\x01\x00\x00\x00\x00\x001\r\nab\r\n0\r\n\r\n",
    b"\x01\x00\x02\x00\x00\x001\nab\n0\n\n",
    b"\x01\x00\x05\x00\x00\x00ffffffffffffffff\r\nabc",
    b"\x01\x00\x05\x00\x00\x0011111111111111111\r\nabc",
    b"\x01\x00\x05\x00\x00\x000\r\nContent-Length: 5\r\nHost: b\r\nETag: 1\r\n\r\n",
    b'\x01\x00\x05\x00\x00\x002 ;ext="a"\r\nab\r\n0\r\n\r\n',
)


@dataclass
class Passed:
    """What became of one way of cutting a stream."""

    out: bytes = b""
    taken: int = 0
    done: bool = False
    refused: bool = False


def run(data: bytes) -> None:
    program = Program(data)
    chunked, length = program.byte() & 1, program.byte()
    strides = program.take(4)
    stream = program.rest()
    size = (
        b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % (length + 1)
    )
    fields = parse_request_fields(b"Host: a\r\n" + size, 1, REMOVE)
    head = _LINE + fields.forwarded + b"\r\n"

    whole = _feed(fields, [stream] if stream else [])
    parts = _feed(fields, list(split(stream, strides)))
    assert whole.refused == parts.refused, "refused in one piece, or in several, but not in both"
    read = read_requests(head + parts.out)
    sent = read.messages[0]
    assert not read.rest, f"bytes behind the request: {read.rest!r}"
    _check_came(head + stream, parts, sent)
    if whole.refused:
        assert not sent.complete, "a body that was refused arrives as if it were whole"
        return
    assert (whole.taken, whole.done) == (parts.taken, parts.done)
    if whole.out != parts.out:  # the chunks are cut otherwise
        assert sent == read_requests(head + whole.out).messages[0]
    behind = translate.behind_body(fields, stream)
    assert behind == (stream[whole.taken :] if whole.done else None)


def _feed(fields: RequestFields, pieces: list[bytes]) -> Passed:
    passed = Passed()
    body = translate.RequestBody(fields, REMOVE)
    for piece in pieces:
        try:
            out, taken = body.feed(piece)
        except MalformedError as error:
            assert str(error).isprintable()
            passed.refused = True
            break
        assert taken == len(piece) or body.done, "bytes of an unfinished body were left"
        passed.out += out
        passed.taken += taken
        if body.done:
            passed.done = True
            break
    return passed


def _check_came(came: bytes, passed: Passed, sent: Message) -> None:
    """Hold what goes on against what h11 finds in what came."""
    try:
        message = read_requests(came, most=1).messages[0]
    except h11.RemoteProtocolError as error:
        undecided = not passed.done and has_bare_lf(came)
        assert passed.refused or undecided or h11_is_stricter(error), error
        return
    assert message.body.startswith(sent.body), "a payload that did not come"
    if passed.refused or (not passed.done and has_bare_lf(came)):
        return
    assert message.body == sent.body
    assert message.complete == sent.complete == passed.done
    if passed.done:
        check_trailers(sent.trailers, message.trailers, REMOVE)

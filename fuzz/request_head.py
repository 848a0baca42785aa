"""Request heads: what goes on is what h11 reads in what came, and reads back to itself."""

from __future__ import annotations

import re

from dstack_mesh.errors import BadRequest, HeaderTooLarge, UriTooLong
from dstack_mesh.wire import request, request_line
from dstack_mesh.wire.framing import Framing
from dstack_mesh.wire.limits import MAX_FIELDS
from fuzz.reader import Message, read_requests
from fuzz.rules import check_head_bytes, check_no_lookalikes, end_to_end, members, options

REMOVE = frozenset((b"x-dstack-target-app", b"x-dstack-app-id", b"x-forwarded-for"))

_AUTHORITY = re.compile(rb"([^/?]+)(.*)")
_NO_HOST = b"Host: own\r\n"
_TUNNELS = (b"h2", b"h3", b"http/", b"tls/")

_START = b"GET / HTTP/1.1\r\nHost: a\r\n"

SEEDS = (
    b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 16_383),
    b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 16_384),
    b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % (b" " * 16_384),
    _START + b"A:\r\n" * 127 + b"\r\n",
    _START + b"A:\r\n" * 128 + b"\r\n",
    _START + b"TE: trailers\r\n" + b"A:\r\n" * 126 + b"\r\n",
    _START + b"Connection: Host\r\n\r\n",
    _START + b"Host: a\r\n\r\n",
    _START + b"A: \0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    b"GET http://a?b HTTP/1.1\r\nHost: c\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /p?q=1 HTTP/1.0\r\nX-A: b\r\nConnection: keep-alive\r\n\r\n",
    b"POST http://a.b:80/p HTTP/1.1\r\nHost: c\r\nContent-Length: 5\r\n\r\n",
    b"OPTIONS http://a HTTP/1.1\r\nHost: c\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:8\r\nX-Request-Id: 7\r\n\r\n",
    (
        b"PUT /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\n"
        b"Connection: TE, X-Own\r\nX-Own: 1\r\nTrailer: X-T\r\n\r\n"
    ),
    b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n",
    (
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Dstack-Target-App: 1\r\nx_dstack_app_id: 2\r\n"
        b"Connection: close\r\n\r\n"
    ),
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\ncontent_length: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nA: 1\n\r\n",
    b"GET / HTTP/1.1\r\n Host: a\r\nA : 1\r\nno colon\r\n\r\n",
)


def run(data: bytes) -> None:
    head = data.partition(b"\r\n\r\n")[0] + b"\r\n"
    first, _, block = head.partition(b"\r\n")
    try:
        line = request_line.parse_request_line(first)
        fields = request.parse_request_fields(block, line.minor, REMOVE, line.authority)
    except (BadRequest, HeaderTooLarge, UriTooLong) as error:
        assert error.detail.isprintable(), error.detail
        return
    came = read_requests(head + b"\r\n").messages[0]
    host = b"" if fields.host is not None else _NO_HOST
    passed_on = b"%b %b HTTP/1.1\r\n%b%b\r\n" % (line.method, line.target, host, fields.forwarded)
    check_head_bytes(passed_on)
    _check_meaning(line, fields, came, read_requests(passed_on).messages[0])
    _check_again(line, fields, passed_on)


def _check_meaning(
    line: request_line.RequestLine, fields: request.RequestFields, came: Message, passed: Message
) -> None:
    """Hold what h11 reads in what goes on against what it reads in what came."""
    assert passed.first == (line.method, line.target)
    assert came.first[0] == line.method
    if line.authority is None:
        assert came.first[1] == line.target
    else:
        scheme, _, rest = came.first[1].partition(b"://")
        assert scheme.lower() in (b"http", b"https")
        authority, path = _AUTHORITY.fullmatch(rest).groups()  # type: ignore[union-attr]
        empty = b"*" if line.method == b"OPTIONS" else b"/"
        path = (b"/" + path if path.startswith(b"?") else path) or empty
        assert (line.authority, line.target) == (authority, path)
        assert b"@" not in authority
    assert came.minor == line.minor

    kept = end_to_end(came.fields, REMOVE)
    if line.authority is not None:
        kept = [(b"Host", line.authority), *(f for f in kept if f[0].lower() != b"host")]
    elif fields.host is None:
        kept = [(b"Host", b"own"), *kept]
    count = len(kept)
    assert passed.fields[:count] == kept, f"{passed.fields} is not {kept} and more"
    assert len(passed.named(b"host")) == 1
    check_no_lookalikes(passed.fields)
    _check_own(dict(passed.fields[count:]), passed.fields[count:], came)
    assert passed.complete == came.complete == (fields.framing is Framing.NONE)
    if fields.framing is Framing.LENGTH:
        assert int(came.named(b"content-length")[0]) == fields.length
        assert int(passed.named(b"content-length")[0]) == fields.length
    assert (fields.framing is Framing.CHUNKED) == bool(passed.named(b"transfer-encoding"))
    assert fields.persists(line.minor) == (
        b"close" not in options(came.fields)
        and (line.minor == 1 or b"keep-alive" in options(came.fields))
    )


def _check_own(own: dict[bytes, bytes], pairs: list[tuple[bytes, bytes]], came: Message) -> None:
    """Hold the fields of the next connection, which the mesh writes, against what was asked."""
    assert len(own) == len(pairs), f"one of {pairs} is there twice"
    said = {name: members(came.fields, name) for name in (b"te", b"upgrade", b"transfer-encoding")}
    assert (own.pop(b"Transfer-Encoding", None) == b"chunked") == bool(said[b"transfer-encoding"])
    listed = members(pairs, b"connection")
    assert listed == {name.lower() for name in own} - {b"connection"}
    assert (own.pop(b"TE", None) == b"trailers") == (b"trailers" in said[b"te"])
    upgrade = own.pop(b"Upgrade", None)
    if upgrade is not None:
        asked = members(pairs, b"upgrade")
        assert asked, "an empty Upgrade"
        assert asked <= said[b"upgrade"]
        assert b"upgrade" in options(came.fields)
        assert not any(protocol.startswith(_TUNNELS) for protocol in asked)
    own.pop(b"Connection", None)
    assert not own, f"the mesh's own fields are more than it may add: {own}"


def _check_again(
    line: request_line.RequestLine, fields: request.RequestFields, passed_on: bytes
) -> None:
    """Have the next mesh read it: it understands the same, and passes on the same."""
    first, _, block = passed_on[:-2].partition(b"\r\n")
    again = request_line.parse_request_line(first)
    assert (again.method, again.target) == (line.method, line.target)
    assert (again.minor, again.authority) == (1, None)
    if block.count(b"\n") > MAX_FIELDS:
        return  # the mesh's own lines came on top of a head that was full
    second = request.parse_request_fields(block, 1, REMOVE)
    host = b"" if fields.host is not None else _NO_HOST
    assert second.forwarded == host + fields.forwarded
    assert (second.framing, second.length) == (fields.framing, fields.length)
    assert second.upgrade == fields.upgrade
    assert not second.removed

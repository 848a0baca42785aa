"""Strategies: messages that are valid, damaged ones made of them, and splits of bytes into reads.

A valid message is a value that says what it means; its bytes are one of the ways to write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hypothesis import strategies as st
from tests.memory_mesh import TARGET_LINE

Field = tuple[bytes, bytes]

TOKEN_SYMBOLS = "!#$%&'*+-.^_`|~"
ALPHANUMERIC = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TOKEN = st.text(ALPHANUMERIC + TOKEN_SYMBOLS, min_size=1, max_size=12).map(str.encode)
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_IN_VALUES = " \t" + _PRINTABLE + "".join(map(chr, range(0x80, 0x100)))
_PATH = _PRINTABLE.replace("#", "")


def cgi(name: bytes) -> bytes:
    """Give the variable that a lenient backend makes of a field's name (RFC 3875 4.1.18)."""
    return re.sub(rb"[^A-Z0-9]", b"_", name.upper())


HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"transfer-encoding", b"upgrade")
)
TARGET_NAMES = (b"x-dstack-target-app", b"x-dstack-target-port", b"x-dstack-target-instance")
IDENTITY_NAMES = (b"x-dstack-app-id", b"x-real-ip", b"x-forwarded-proto")
STRIPPED_INBOUND = (*IDENTITY_NAMES, b"x-client-cert", b"x-client-verify", b"x-forwarded-for")
_MEANS_SOMETHING = frozenset(
    map(
        cgi,
        (
            *HOP_BY_HOP,
            *TARGET_NAMES,
            *STRIPPED_INBOUND,
            *(b"host", b"content-length", b"content-encoding", b"content-range", b"content-type"),
            *(b"authorization", b"cookie", b"expect", b"max-forwards", b"proxy-authenticate"),
            *(b"proxy-authorization", b"range", b"set-cookie", b"trailer", b"www-authenticate"),
            *(b"age", b"cache-control", b"date", b"expires", b"location", b"retry-after", b"vary"),
            *(b"x-dstack-mesh-error", b"x-request-id"),
        ),
    )
)

names = st.sampled_from(
    [b"Accept", b"X-A", b"x-a", b"x_b", b"Via", b"ETag", b"Server"]
) | _TOKEN.filter(lambda name: cgi(name) not in _MEANS_SOMETHING)
"""Field names that no rule of the mesh is about."""

values = st.sampled_from([b"", b"1", b"a, b", b'"x y"', b"*/*", b":;,=", b"\xe9 \t\xff"]) | st.text(
    _IN_VALUES, max_size=20
).map(lambda text: text.encode("latin-1").strip(b" \t"))
fields = st.lists(st.tuples(names, values), max_size=5)
bodies = st.binary(max_size=60) | st.sampled_from(
    [
        b"0\r\n\r\n",
        b"GET /smuggled HTTP/1.1\r\nHost: s\r\n\r\n",
        b"\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ]
)
targets = st.builds(
    lambda path, query: b"/" + path + query,
    st.text(_PATH, max_size=15).map(str.encode),
    st.sampled_from([b"", b"?", b"?a=b&c", b"?/../"]),
).filter(lambda target: target.partition(b"?")[0] not in (b"/health", b"/gateway"))
methods = st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"get"])


@dataclass(frozen=True)
class Chunked:
    """How a chunked body is written: its pieces, and how their lines look."""

    pieces: tuple[bytes, ...]
    size_format: bytes = b"%x"
    extension: bytes = b""
    trailers: tuple[Field, ...] = ()

    @property
    def wire(self) -> bytes:
        out = b""
        for piece in self.pieces:
            out += self.size_format % len(piece) + self.extension + b"\r\n" + piece + b"\r\n"
        return out + b"0" + self.extension + b"\r\n" + _lines(self.trailers) + b"\r\n"


@dataclass(frozen=True)
class Message:
    """A request or a response. `fields` are in the order in which they are written."""

    first: bytes
    fields: tuple[Field, ...]
    body: bytes = b""
    chunked: Chunked | None = None

    @property
    def head(self) -> bytes:
        return self.first + b"\r\n" + _lines(self.fields) + b"\r\n"

    @property
    def wire(self) -> bytes:
        return self.head + (self.chunked.wire if self.chunked else self.body)

    @property
    def trailers(self) -> tuple[Field, ...]:
        return self.chunked.trailers if self.chunked else ()

    def get(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key.lower() == name]

    def with_field(self, at: int, *added: Field) -> Message:
        """Give the message with `added` in front of the field at `at`."""
        at = min(at, len(self.fields))
        return replace(self, fields=(*self.fields[:at], *added, *self.fields[at:]))


def _lines(of: tuple[Field, ...]) -> bytes:
    return b"".join(b"%b: %b\r\n" % field for field in of)


_CHUNK_CUTS = st.lists(st.integers(0, 63), max_size=4)
_SIZE_FORMATS = st.sampled_from([b"%x", b"%X", b"%04x", b"%016X"])
_EXTENSIONS = st.sampled_from([b"", b"", b";a", b' ; a="b;c"', b"\t;x=\xff"])
_TRAILERS = st.lists(st.tuples(names, values), max_size=3).map(tuple)


@st.composite
def chunkings(draw: st.DrawFn, body: bytes) -> Chunked:
    """Ways to write `body` in chunks."""
    cuts = sorted({at % (len(body) + 1) for at in draw(_CHUNK_CUTS)})
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    return Chunked(
        tuple(piece for piece in pieces if piece),
        draw(_SIZE_FORMATS),
        draw(_EXTENSIONS),
        draw(_TRAILERS),
    )


@st.composite
def _framed(
    draw: st.DrawFn, kinds: list[str], own: list[Field]
) -> tuple[list[Field], bytes, Chunked | None]:
    """Draw a body and its framing; gives `own` with the framing's field somewhere in it."""
    kind = draw(st.sampled_from(kinds))
    body = b"" if kind == "none" else draw(bodies)
    chunked = draw(chunkings(body)) if kind == "chunked" else None
    line: list[Field] = []
    if chunked:
        name = draw(st.sampled_from([b"Transfer-Encoding", b"transfer-encoding"]))
        line = [(name, draw(st.sampled_from([b"chunked", b"Chunked"])))]
    elif kind == "length":
        line = [(draw(st.sampled_from([b"Content-Length", b"content-length"])), b"%d" % len(body))]
    at = draw(st.integers(0, len(own)))
    return own[:at] + line + own[at:], body, chunked


_CONNECTION = st.sampled_from(
    [
        [],
        [],
        [],
        [(b"Connection", b"keep-alive")],
        [(b"Connection", b"x-a, , X_B"), (b"Keep-Alive", b"timeout=5")],
        [(b"TE", b"trailers, deflate;q=0.5"), (b"connection", b"te")],
        [(b"Proxy-Connection", b"keep-alive"), (b"Upgrade", b"h2c")],
        [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket, h2c, IRC/6.9")],
    ]
)


@st.composite
def requests(
    draw: st.DrawFn,
    *,
    persistent: bool = False,
    verbs: st.SearchStrategy[bytes] = methods,
    extra: st.SearchStrategy[list[Field]] = st.just([]),  # noqa: B008 - a strategy is a value
) -> Message:
    """Valid requests; `persistent` leaves out those behind which no other can come."""
    minor = 1 if persistent else draw(st.sampled_from([1, 1, 1, 0]))
    own = [(b"Host", draw(st.sampled_from([b"h", b"h.example:80", b"[::1]:8"])))]
    own += draw(fields) + draw(_CONNECTION)
    if not persistent and draw(st.booleans()):
        own.append((b"Connection", b"close"))
    own = draw(st.permutations(own + draw(extra)))
    kinds = ["none", "none", "length", *(["chunked", "chunked"] if minor else [])]
    all_fields, body, chunked = draw(_framed(kinds, list(own)))
    target = draw(targets)
    if draw(st.sampled_from([False, False, False, True])):
        target = b"http://Other.example" + target
    verb = draw(verbs)
    if minor == 0 and body and verb in (b"GET", b"HEAD", b"DELETE", b"OPTIONS"):
        verb = b"POST"  # the others may have none in HTTP/1.0
    first = b"%b %b HTTP/1.%d" % (verb, target, minor)
    return Message(first, tuple(all_fields), body, chunked)


@st.composite
def responses(draw: st.DrawFn, *, closing: bool = True) -> Message:
    """Valid final responses to a GET; `closing` includes those that the connection's end ends."""
    status = draw(st.sampled_from([b"200 OK", b"404 ", b"500 \xe9 \t!", b"999 x", b"201 Created"]))
    kinds = ["length", "chunked", *(["close"] if closing else [])]
    minor = draw(st.sampled_from([1, 1, 1, 0])) if closing else 1
    if minor == 0:
        kinds.remove("chunked")
    options = [[], [], [(b"Connection", b"keep-alive, x-a")], [(b"Keep-Alive", b"timeout=5")]]
    if closing:
        options += [[(b"Connection", b"close")]]
    own = draw(st.permutations(draw(fields) + draw(st.sampled_from(options))))
    all_fields, body, chunked = draw(_framed(kinds, list(own)))
    return Message(b"HTTP/1.%d %b" % (minor, status), tuple(all_fields), body, chunked)


interims = st.lists(
    st.builds(
        lambda status, own: Message(b"HTTP/1.1 " + status, tuple(own)),
        st.sampled_from([b"100 Continue", b"103 Early Hints", b"102 Processing"]),
        fields,
    ),
    max_size=3,
)


def to_target(message: Message, at: int = 1) -> Message:
    """Address a request to the target app."""
    name, _, value = TARGET_LINE.strip().partition(b": ")
    return message.with_field(at, (name, value))


# Damage.

BAD_TOKENS = [
    *(b"\r", b"\n", b"\r\n", b"\n\n", b"\r\r\n", b"\r\n\r\n", b"\0", b"\x0b", b"\x0c", b"\x7f"),
    *(
        b" ",
        b"\t",
        b":",
        b",",
        b";",
        b"+",
        b"-1",
        b"0x",
        b"g",
        b"_",
        b"00000000000000000",
        b"\xff",
        b"\xa0",
    ),
    *(b"\r\n folded", b"HTTP/1.1", b"HTTP/2.0", b"GET / HTTP/1.1\r\n", b"0\r\n\r\n", b"#", b"%"),
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Content-Length : 5\r\n",
    b"Content_Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity, chunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Host: other\r\n",
    b"Connection: host\r\n",
    b"Connection: content-length, close\r\n",
    b"x-dstack-target-app: none\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
]

_STRUCTURE = re.compile(rb"[\r\n :,;/]|\A|\Z")


def structure_points(wire: bytes) -> list[int]:
    """Give the places at and behind each byte that separates something."""
    found = {match.start() + shift for match in _STRUCTURE.finditer(wire) for shift in (0, 1)}
    return sorted(at for at in found if at <= len(wire))


def place(points: list[int], last: int, drawn: int) -> int:
    """Turn a number into a place: an even one into one of `points`, any other into any place."""
    drawn, anywhere = divmod(drawn, 2)
    return drawn % (last + 1) if anywhere or not points else points[drawn % len(points)]


_DRAWN = st.integers(0, 2047)
_CHANGES = st.lists(
    st.tuples(
        _DRAWN,
        st.sampled_from([0, 0, 0, 1, 1, 2, 4, 20]),
        st.sampled_from([b"", *BAD_TOKENS]) | st.binary(min_size=1, max_size=3),
        st.sampled_from([0, 0, 0, 8, 40]),
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def damages(draw: st.DrawFn, wire: bytes) -> bytes:
    """Bytes that are `wire` but for one to three changes, most of them where it has structure."""
    for drawn, size, put, repeated in draw(_CHANGES):
        at = place(structure_points(wire), len(wire), drawn)
        wire = wire[:at] + put + wire[at : at + repeated] + wire[at + size :]
    return wire


# Splits.

_CUTS = st.lists(_DRAWN, max_size=8)


@st.composite
def splits(draw: st.DrawFn, wire: bytes) -> list[bytes]:
    """Ways in which `wire` can arrive: byte by byte, or cut here and there."""
    if len(wire) < 400 and draw(st.sampled_from([False, False, True])):
        return [wire[i : i + 1] for i in range(len(wire))]
    points = structure_points(wire)
    cuts = {place(points, len(wire), drawn) for drawn in draw(_CUTS)} - {0, len(wire)}
    inner = sorted(cuts)
    return [wire[a:b] for a, b in zip([0, *inner], [*inner, len(wire)], strict=True)]

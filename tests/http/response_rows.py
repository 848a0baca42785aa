"""The rows of responses.txt, what their last column tells, and h11's reading of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import h11
import pytest

from tests.http.corpus import Message, responses

BOTH = ("inbound", "outbound")
_FIELDS = {
    "EARLY": b"Content-Length: 8\r\n",
    "KEEP10": b"Connection: keep-alive\r\n",
    "UPGRADE": b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
}
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(frozen=True)
class Told:
    """The last column of a row."""

    directions: tuple[str, ...]
    apart: bool
    end: str
    """`eof`, `fin`, `reset` or empty."""
    request: str
    client: str
    """`kept`, `closing`, `close`, `cut`, `tunnel` or the code of a 502."""
    pooled: bool

    @property
    def method(self) -> str:
        return {"HEAD": "HEAD", "EARLY": "POST"}.get(self.request, "GET")

    @property
    def minor(self) -> int:
        return 0 if self.request.endswith("10") else 1

    @property
    def failed(self) -> bool:
        """Whether the mesh itself answers."""
        return self.client.startswith("upstream_")

    @property
    def client_kept(self) -> bool:
        return self.client == "kept" or (self.failed and self.request != "GET10")

    def head(self, path: str, fields: bytes) -> bytes:
        """Give the request; an early response comes when half its body is there."""
        fields += _FIELDS.get(self.request, b"")
        line = f"{self.method} {path} HTTP/1.{self.minor}\r\nHost: a\r\n"
        return line.encode() + fields + b"\r\n" + (b"half" if self.request == "EARLY" else b"")


_TOLD = re.compile(
    r"(?:(inbound|outbound) )?(apart )?(?:(eof|fin|reset) )?(GET|HEAD|EARLY|UPGRADE|GET10|KEEP10) "
    r"(?:(kept|closing|close|cut|tunnel)|502 (upstream_\w+)) (kept|dropped)"
).fullmatch


def told(row: Message) -> Told:
    match = _TOLD(row.told)
    assert match is not None, f"responses.txt:{row.line}: {row.told!r} says nothing"
    way, apart, end, request, client, code, pool = match.groups()
    return Told(
        (way,) if way else BOTH, bool(apart), end or "", request, client or code, pool == "kept"
    )


def parts(row: Message, *, apart: bool) -> list[bytes]:
    """Give what is sent at one time each."""
    head, blank, rest = row.sent.partition(b"\r\n\r\n")
    return [head + blank, rest] if apart else [row.sent]


def before_end(row: Message, what: Told) -> bytes:
    """Give what the client has before the upstream ends its connection, where it does."""
    if what.end in ("eof", "fin") and what.client == "kept":
        return row.passed_on.removesuffix(_LAST_CHUNK)
    return row.passed_on


ROWS = responses()
one_row = pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
passed_on = pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id) for row in ROWS if row.passed_on]
)
each_way = pytest.mark.parametrize(
    ("way", "row"),
    [pytest.param(way, row, id=f"{way}-{row.id}") for row in ROWS for way in told(row).directions],
)


@dataclass
class Read:
    """What h11 made of one response."""

    interims: list[int] = field(default_factory=list)
    status: int = 0
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    whole: bool = False
    behind: bytes = b""
    """Bytes that are not the response's."""


def read(data: bytes, what: Told, *, ended: bool) -> Read:
    """Read as a strict client that asked what the row's client asked."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=200_000)
    headers = [("Host", "a")] + [("Content-Length", "0")] * (what.request == "EARLY")
    if what.request == "UPGRADE":
        headers += [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    parser.send(h11.Request(method=what.method, target="/", headers=headers))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    if ended:
        parser.receive_data(b"")
    one = Read()
    while True:
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError:
            return one
        if isinstance(event, h11.InformationalResponse):
            one.interims.append(event.status_code)
        elif isinstance(event, h11.Response):
            one.status = event.status_code
        elif isinstance(event, h11.Data):
            one.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            one.trailers = list(event.headers)
            one.whole, one.behind = True, parser.trailing_data[0]
            return one
        elif event is h11.PAUSED:
            one.status, one.whole, one.body = 101, True, parser.trailing_data[0]
            return one
        else:
            assert event in (h11.NEED_DATA, h11.ConnectionClosed)
            return one

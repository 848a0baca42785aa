"""Two accounts of the same bytes: what the mesh meant to send, and what a peer understood."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import h11

from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.service import Service
from dstack_mesh.sidecar import Sidecar


@dataclass(frozen=True)
class Meant:
    """One request that the mesh began to send to a peer, by the mesh's own account."""

    method: str
    target: str
    size: int
    """Bytes of head and body, framing and trailers included."""
    complete: bool
    """Whether the mesh sent all of it."""
    head: bytes = b""
    body: bytes | None = None
    """The payload, once an independent reader has taken it off the bytes."""


@dataclass(frozen=True)
class Seen:
    """One request, or what was taken for one, by a peer's account."""

    method: str
    target: str
    status: int
    """What the peer answered; 0 for nothing."""
    complete: bool
    """Whether the peer read it to its end."""
    size: int | None = None
    body: bytes | None = None


class Book:
    """What a peer saw, by the port of the connection; ports come again."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Seen]] = defaultdict(list)

    def add(self, port: int, one: Seen) -> None:
        """Enter a request."""
        self._seen[port].append(one)

    def seen(self, port: int) -> list[Seen]:
        """Give all that came from a port."""
        return self._seen[port]

    def counts(self) -> dict[int, int]:
        """Give how much came from each port so far."""
        return {port: len(seen) for port, seen in self._seen.items()}


class Ledger:
    """Takes down each exchange of one of a sidecar's listeners, in the order of their ends."""

    def __init__(self, sidecar: Sidecar, direction: str) -> None:
        self.service: Service = getattr(sidecar, f"_{direction}")
        self.exchanges: list[Exchange] = []
        self._record = self.service.on_record
        self.service.on_record = self._note

    def _note(self, direction: str, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        if self._record is not None:
            self._record(direction, exchange)

    def __len__(self) -> int:
        return len(self.exchanges)

    def meant(self, since: int) -> list[Meant]:
        """Give what went, or began to go, to the peer in the exchanges from number `since` on."""
        return [
            Meant(
                exchange.line.method.decode("ascii"),
                exchange.line.target.decode("ascii"),
                len(exchange._route.head) + exchange.bytes_up,
                exchange.request_done,
                exchange._route.head,
            )
            for exchange in self.exchanges[since:]
            if exchange._response is not None
        ]


Excuse = Callable[[Meant, Seen], str | None]
"""Why a peer may refuse what the mesh sent it whole; None: for no reason that we know of."""


def disagreements(meant: Sequence[Meant], seen: Sequence[Seen], excuse: Excuse) -> list[str]:
    """Compare both accounts of one row; give what differs in words, nothing where they agree."""
    found: list[str] = []
    left = list(seen)
    for message in meant:
        if not message.complete:
            if left and not left[0].complete and _alike(message, left[0]):
                left.pop(0)
            continue
        if not left:
            found.append(f"the peer saw nothing of {message}")
            continue
        one = left.pop(0)
        if not one.complete:
            if excuse(message, one) is None:
                found.append(f"the peer refused {message}, which no exception tells: {one}")
        elif not _alike(message, one) or not _equal(message, one):
            found.append(f"the mesh sent {message}, the peer saw {one}")
    found += [f"the mesh never sent what the peer saw: {one}" for one in left]
    return found


def _alike(message: Meant, one: Seen) -> bool:
    return (message.method, message.target) == (one.method, one.target)


def _equal(message: Meant, one: Seen) -> bool:
    same_size = one.size is None or one.size == message.size
    return same_size and (None in (one.body, message.body) or one.body == message.body)


class UnreadableError(Exception):
    """Bytes in which h11 does not find what the mesh meant."""


def read_bodies(meant: Sequence[Meant], links: Sequence[bytes]) -> list[Meant]:
    """Take each request off the bytes that went over each connection, and give it its body.

    The mesh's sizes say where a request ends, h11 says what is in there. Raises `UnreadableError`
    where a size is not that of exactly one request, or bytes are left that belong to none.
    """
    read: list[Meant] = []
    entries = list(meant)
    for data in links:
        while data:
            if not entries:
                raise UnreadableError(f"bytes of no exchange: {data[:200]!r}")
            entry = entries.pop(0)
            if entry.complete:
                read.append(_with_body(entry, data[: entry.size]))
                data = data[entry.size :]
            else:
                read.append(entry)
                line = f"{entry.method} {entry.target} HTTP/1.1\r\n".encode("ascii")
                data = b"" if data.startswith(line) else data
    if whole := [entry for entry in entries if entry.complete]:
        raise UnreadableError(f"never on the wire: {whole}")
    return read + entries


def _with_body(entry: Meant, data: bytes) -> Meant:
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=256 * 1024)
    reader.receive_data(data)
    body = b""
    try:
        head = reader.next_event()
        while isinstance(event := reader.next_event(), h11.Data):
            body += event.data
    except h11.RemoteProtocolError as error:
        raise UnreadableError(f"{error}: {data[:200]!r}") from error
    if not isinstance(head, h11.Request) or not isinstance(event, h11.EndOfMessage):
        raise UnreadableError(f"not one whole request: {data[:200]!r}")
    if reader.trailing_data[0]:
        raise UnreadableError(f"{reader.trailing_data[0]!r} behind the request")
    if (head.method, head.target) != (entry.method.encode(), entry.target.encode()):
        raise UnreadableError(f"h11 reads {head.method!r} {head.target!r} for {entry}")
    return replace(entry, body=body)

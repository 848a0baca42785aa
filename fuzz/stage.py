"""A mesh in memory on which a script is played, and what must hold of everything that was sent."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field

import h11
from tests.memory_mesh import FarEnd, MemoryMesh

from dstack_mesh.relay.deadlines import Timeouts
from fuzz.reader import Message, Read, h11_is_stricter, read_requests, read_responses
from fuzz.rules import alike, check_head_bytes, check_no_lookalikes
from fuzz.script import MARK, Scene, What, mark_of, marks, marks_in, spelt_out

TIMEOUTS = Timeouts(head=2.0, idle=8.0, response=4.0, linger=1.0)
MAX_SCENES = 24
MAX_CLIENTS = 3
_SECONDS = (0.5, 1.5, 2.5, 4.5)


@dataclass
class Served:
    """A server, and what it sent at which point of what it was sent."""

    end: FarEnd
    sent: list[tuple[int, bytes]] = field(default_factory=list)
    ended: bool = False
    """Whether it has finished sending, in order."""

    _read: Read = field(default_factory=Read)
    _read_of: tuple[int, int | None] = (0, None)

    def requests(self) -> Read:
        """Read what it was sent; what follows a switch of protocols is no request."""
        received = self.end.received
        switched_by = self.switched_by()
        now = len(received), switched_by
        if now != self._read_of:
            most = 1000 if switched_by is None else switched_by + 1
            self._read = read_requests(received, most=most)
            self._read_of = now
        return self._read

    def sent_before(self, offset: int) -> bytes:
        """Give what it had sent when it had been sent `offset` bytes."""
        return b"".join(data for at, data in self.sent if at <= offset)

    def switched_by(self) -> int | None:
        """Give the number of the request that it has answered by a 101, and that had asked for it.

        A 101 that nobody asked for is no answer.
        """
        sent = b"".join(data for _, data in self.sent)
        for found in _SWITCHING.finditer(sent):
            before = self.end.received[: self._asked_when_sent(found.end())]
            with contextlib.suppress(h11.RemoteProtocolError):  # read in what the switch was to
                asked = read_requests(before).messages
                number = _answered_by_101(sent, [one.first[0] for one in asked])
                if 0 <= number < len(asked) and asked[number].named(b"upgrade"):
                    return number
        return None

    def _asked_when_sent(self, size: int) -> int:
        """Give the bytes that it had been sent when it had sent `size`."""
        total = 0
        for at, data in self.sent:
            total += len(data)
            if total >= size:
                return at
        return 0


_SWITCHING = re.compile(b" 101")


def _answered_by_101(sent: bytes, methods: list[bytes]) -> int:
    """Give the number of the request that a 101 in `sent` answers; -1: none."""
    try:
        answers = read_responses(sent, methods, offered=b"websocket")
    except h11.RemoteProtocolError:
        return len(methods) - 1  # all before were answered by what can be read
    finals = sum(one.first[0] >= b"200" for one in answers.messages)
    return finals if answers.switched else -1


class Stage:
    """Plays scenes on a mesh; `check` holds the outcome against the promises."""

    def __init__(self, mesh: MemoryMesh, removed: frozenset[bytes]) -> None:
        self.mesh = mesh
        self.removed = removed
        self.servers: list[Served] = []
        self.answered: set[bytes] | None = set()
        """Bodies of the answers that servers gave as a whole."""
        self.read: dict[FarEnd, Read] = {}
        self.broken: set[int] = set()
        """Clients whose connection was lost: anything may be cut off."""

    def play(self, one: Scene) -> None:
        """Have one thing happen."""
        client = self.mesh.clients[one.who % len(self.mesh.clients)]
        served = self._server(one.who)
        if one.what is What.CLIENT_SENDS:
            client.sends(spelt_out(one.sent, self._mark(client)))
        elif one.what is What.TOGETHER:
            text = spelt_out(one.sent, self._mark(client))
            half = one.who * len(text) // 16
            client.sends_at_once(text[:half], text[half:])
        elif one.what is What.TIME:
            self.mesh.pass_time(_SECONDS[one.who & 3])
        elif one.what in _CLIENT:
            if one.what is What.CLIENT_BREAKS:
                self.broken.add(self.mesh.clients.index(client))
            _CLIENT[one.what](client)
        elif served is None:
            return
        elif one.what is What.SERVER_SENDS:
            data = spelt_out(one.sent, self._answers(served) if MARK in one.sent else b"")
            if not served.end.transport.is_closing():
                served.sent.append((len(served.end.received), data))
            served.end.sends(data)
        elif one.what in _SERVER:
            served.ended = served.ended or one.what is What.SERVER_ENDS
            _SERVER[one.what](served.end)

    def _server(self, who: int) -> Served | None:
        known = len(self.servers)
        self.servers += [Served(end) for end in self.mesh.upstreams[known:]]
        return self.servers[-1 - who % len(self.servers)] if self.servers else None

    def _mark(self, client: FarEnd) -> bytes:
        return mark_of(self.mesh.clients.index(client))

    def _answers(self, served: Served) -> bytes:
        """Give the marks of the request that the server now answers: the last it has got."""
        received = served.end.received
        if served.switched_by() is not None:
            # Of the request that switched, and of what came behind it; not of those before.
            before = sum(served.requests().sizes[:-1])
            return b"".join(sorted(marks(received[before:])))
        messages = served.requests().messages
        return marks_in(messages[-1]) if messages else b""

    # What must hold.

    def check(self) -> None:
        """Raise where a promise is broken. The mesh is closed, so that all is recorded."""
        assert not self.mesh.loop.faults, self.mesh.loop.faults
        at_rest = [end for end in self.mesh.clients if _is_at_rest(end)]
        open_clients = [end for end in self.mesh.clients if not end.closed]
        self._server(0)
        pooled = {served.end: served.end.pooled for served in self.servers}
        self.mesh.close()
        assert not self.mesh.loop.faults, self.mesh.loop.faults
        for served in self.servers:
            self._check_server(served, pooled=pooled[served.end])
        for number, client in enumerate(self.mesh.clients):
            self._check_client(number, client, was_open=client in open_clients)
            if client in at_rest:
                self._check_whole(client)

    def _check_server(self, served: Served, *, pooled: bool) -> None:
        received = served.end.received
        if not received:
            return
        read = served.requests()
        offset = 0
        methods: list[bytes] = []
        for message, size in zip(read.messages, read.sizes, strict=True):
            head = received[offset : received.index(b"\r\n\r\n", offset) + 4]
            check_head_bytes(head)
            check_no_lookalikes(message.fields)
            self.check_request(message, served)
            assert len(marks(marks_in(message))) <= 1, "one request out of two clients' bytes"
            self._check_pairs(served, methods, offset)
            methods.append(message.first[0])
            offset += size
        if pooled:
            self._check_pairs(served, methods, len(received))
        self._note_answers(served, methods)

    def _note_answers(self, served: Served, methods: list[bytes]) -> None:
        """Note the bodies of whole answers; None where h11 cannot tell them."""
        try:
            read = read_responses(
                b"".join(data for _, data in served.sent), methods, closed=served.ended
            )
        except h11.RemoteProtocolError:
            self.answered = None
        else:
            if self.answered is not None:
                self.answered |= {one.body for one in read.messages if one.complete}

    def _check_pairs(self, served: Served, methods: list[bytes], offset: int) -> None:
        """All that was asked before was answered, whole, and no byte more, when more was asked."""
        if not methods:
            assert not served.sent_before(offset - 1), "sent into a connection that had spoken"
            return
        try:
            answers = read_responses(served.sent_before(offset), methods)
        except h11.RemoteProtocolError as error:
            assert h11_is_stricter(error), f"used again after {error}"
            return
        finals = [one for one in answers.messages if one.first[0] >= b"200"]
        assert len(finals) == len(methods), "used again before it had answered"
        assert all(one.complete for one in finals), "used again before its answer was whole"
        assert not answers.rest, f"used again with {answers.rest!r} unread"

    def check_request(self, message: Message, served: Served) -> None:
        """Hold one request that a server was sent; the targets add what only they know."""
        for name, _ in (*message.fields, *message.trailers):
            assert alike(name) not in self.removed, f"{name!r} went on"
        assert len(message.named(b"host")) == 1

    def _check_client(self, number: int, client: FarEnd, *, was_open: bool) -> None:
        received = client.received
        mine = mark_of(number)
        assert marks(received) <= {mine}, f"{marks(received)} reached {mine!r}"
        exchanges = [
            one
            for one in self.mesh.records
            if one._client.transport is client.transport  # type: ignore[attr-defined]
        ]
        # One more: what could not be read as a request is answered, too.
        methods = [*(one.line.method for one in exchanges), b"GET"]
        offered = b"websocket" if any(one.fields.upgrade for one in exchanges) else b""
        in_order = client.closed and not client.cut and not was_open and number not in self.broken
        read = read_responses(received, methods, offered=offered)
        if in_order and read.messages and read.messages[-1].first[0] >= b"200":
            read = read_responses(received, methods, offered=offered, closed=True)
        self.read[client] = read
        if read.switched:
            return
        finals = [one for one in read.messages if one.first[0] >= b"200"]
        assert not read.rest or not finals or not finals[-1].complete or len(finals) < len(methods)
        for one in finals[:-1]:
            assert one.complete, "an answer behind one that was not whole"
        if in_order and finals:
            assert finals[-1].complete, "an answer that is not whole ends as if it were"

    def _check_whole(self, client: FarEnd) -> None:
        """A client whose connection goes on has whole answers, as whole as they came."""
        read = self.read[client]
        if read.switched:
            return
        assert not read.rest
        for one in read.messages:
            if one.first[0] >= b"200":
                assert one.complete, "the next answer will be taken for the rest of this one"
        for one in read.messages:
            own = any(b";" not in error for error in one.named(b"x-dstack-mesh-error"))
            if marks(one.body) and not own and self.answered is not None:
                assert one.body in self.answered, f"{one.body!r} is no whole answer"


def _is_at_rest(client: FarEnd) -> bool:
    protocol = client.transport.protocol
    return not client.closed and protocol._exchange is None  # type: ignore[attr-defined]


_CLIENT = {
    What.CLIENT_ENDS: FarEnd.ends,
    What.CLIENT_BREAKS: FarEnd.breaks,
    What.CLIENT_STALLS: FarEnd.stalls,
    What.CLIENT_FLOWS: FarEnd.flows,
}
_SERVER = {
    What.SERVER_ENDS: FarEnd.ends,
    What.SERVER_BREAKS: FarEnd.breaks,
    What.SERVER_STALLS: FarEnd.stalls,
    What.SERVER_FLOWS: FarEnd.flows,
}

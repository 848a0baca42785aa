"""The whole outbound proxy: clients, handshakes, targets and the guest agent, in any order."""

from __future__ import annotations

from dataclasses import replace

from tests.memory_mesh import OTHER, TARGET, FarEnd, OutboundMesh, Shown

from fuzz.reader import Message
from fuzz.script import Scene, What, scene, scenes
from fuzz.stage import MAX_CLIENTS, MAX_SCENES, TIMEOUTS, Served, Stage

_REMOVED = frozenset((b"x-dstack-target-app", b"x-dstack-target-port", b"x-dstack-target-instance"))
_SHOWN = (Shown.TARGET, Shown.TARGET, Shown.TARGET, *Shown)

_C, _S = What.CLIENT_SENDS, What.SERVER_SENDS
_GET = b"\xfc\xfdX-A: \xfe\r\n\r\n"
_OK = b"\xfa\xfe__"

SEEDS = (
    # A client that stops in the middle of its body: what it has of an answer must not look whole.
    scene(_C, 0, b"\xf7\xfd\xf9\r\n2\r\n\xfe")
    + scene(What.VERIFY)
    + scene(_S, 0, b"\xfa\xfe_")
    + scene(What.CLIENT_ENDS),
    scene(_C, 0, _GET) + scene(What.VERIFY) + scene(_S, 0, _OK),
    scene(_C, 0, _GET) + scene(What.VERIFY) + scene(_S, 0, _OK) + scene(_C, 0, _GET) + scene(_S),
    scene(_C, 0, _GET)
    + scene(What.VERIFY)
    + scene(_S, 0, _OK)
    + scene(What.ACCEPT)
    + scene(_C, 1, _GET)
    + scene(_S, 0, _OK + _OK),
    *(scene(_C, 0, _GET) + scene(What.VERIFY, who) for who in range(3, 12)),
    scene(_C, 0, b"\xf7\xfd\xf9\r\n2\r\n\xfe\r\n")
    + scene(What.VERIFY)
    + scene(_C, 0, b"\xf4")
    + scene(_S, 0, b"HTTP/1.1 100 Continue\r\n\r\n" + _OK),
    scene(_C, 0, b"\xf7\xfdContent-Length: 4\r\n\r\n\xfe")
    + scene(What.VERIFY)
    + scene(_S, 0, _OK)
    + scene(_C, 0, b"ab" + _GET)
    + scene(_S, 0, b"HTTP/1.0 200 OK\r\n\r\n\xfe")
    + scene(What.SERVER_ENDS),
    scene(_C, 0, b"\xfc\xfd\xf6X-A: \xfe\r\n\r\n")
    + scene(What.VERIFY)
    + scene(_S, 0, b"\xf5\xfe")
    + scene(_C, 0, b"\xfe more"),
    scene(_C, 0, b"GET /info HTTP/1.0\r\nX-A: \xfe\r\n\r\n") + scene(_S, 0, _OK),
    scene(_C, 0, _GET * 3) + scene(What.VERIFY) + (scene(_S, 0, _OK)) * 3,
    scene(_C, 0, _GET)
    + scene(What.VERIFY)
    + scene(_S, 0, _OK)
    + scene(What.SERVER_BREAKS)
    + scene(_C, 0, _GET)
    + scene(What.VERIFY),
    scene(_C, 0, _GET)
    + scene(What.ACCEPT)
    + scene(_C, 1, b"\xfc\xf8X-A: \xfe\r\n\r\n")
    + scene(What.VERIFY)
    + scene(What.VERIFY)
    + scene(_S, 1, _OK)
    + scene(_S, 0, _OK),
    scene(_C, 0, _GET) + scene(What.VERIFY) + scene(What.TIME, 3),
    scene(
        _C, 0, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /gateway HTTP/1.1\r\nHost: a\r\n\r\n"
    ),
    scene(What.REFUSE) + scene(_C, 0, _GET) + scene(What.REFUSE, 1) + scene(_C, 0, _GET),
    scene(_C, 0, _GET)
    + scene(What.VERIFY)
    + scene(_S, 0, _OK)
    + scene(What.RENEWAL)
    + scene(_C, 0, _GET)
    + scene(What.VERIFY)
    + scene(_S, 0, _OK),
    scene(_C, 0, b"not HTTP\r\n\r\n"),
    scene(What.TOGETHER, 8, _GET) + scene(What.CLIENT_ENDS) + scene(What.VERIFY),
)


class _Outbound(Stage):
    mesh: OutboundMesh

    def __init__(self) -> None:
        super().__init__(OutboundMesh(timeouts=TIMEOUTS), _REMOVED)
        self.asked: dict[FarEnd, bytes] = {}
        """The app-id that each verified server was asked for under."""
        self.refused: list[FarEnd] = []

    def play(self, one: Scene) -> None:
        if one.what is What.ACCEPT:
            if len(self.mesh.clients) < MAX_CLIENTS:
                self.mesh.accept()
        elif one.what is What.VERIFY:
            self._verify(_SHOWN[one.who % len(_SHOWN)])
        elif one.what is What.RENEWAL:
            current = self.mesh.identity.require()
            self.mesh.identity.current = replace(current, generation=current.generation + 1)
            self.mesh.loop.do(self.mesh.pool.drain)
        elif one.what is What.REFUSE:
            self.mesh.loop.accepts, self.mesh.loop.resolves = bool(one.who & 1), bool(one.who & 2)
        else:
            super().play(one)

    def _verify(self, shown: Shown) -> None:
        waiting = self.mesh.handshaking
        if not waiting:
            return
        app_id = next(a for a in (TARGET, OTHER) if waiting[0].server_name.startswith(a))
        before = len(self.mesh.upstreams)
        self.mesh.verify(shown, app_id)
        # What was waiting behind a request that failed may have gone to the agent by now.
        for end in self.mesh.upstreams[before:]:
            if end.server_name and shown is Shown.TARGET:
                self.asked[end] = app_id.encode()
            elif end.server_name:
                self.refused.append(end)

    def check(self) -> None:
        for end in self.refused:
            assert not end.received, "sent to a peer that is not the app asked for"
            assert end.closed
        super().check()
        assert not self.mesh.peers.written_before, "sent before the peer's chain was looked at"
        for end in self.mesh.targets:
            assert not end.received or end in self.asked

    def check_request(self, message: Message, served: Served) -> None:
        super().check_request(message, served)
        to_target = served.end in self.asked
        assert to_target == bool(served.end.server_name)
        if message.first[0] == b"OPTIONS" and message.first[1] == b"*":
            return
        assert message.first[1].startswith(b"/")


def run(data: bytes) -> None:
    stage = _Outbound()
    try:
        for one in scenes(data, MAX_SCENES):
            stage.play(one)
        stage.check()
    finally:
        stage.mesh.close()

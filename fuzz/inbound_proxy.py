"""The whole terminator: callers with and without an identity, and one backend, in any order."""

from __future__ import annotations

from dataclasses import replace

from tests.memory_mesh import CALLER_ADDRESS, OTHER, TARGET, InboundMesh, Shown

from fuzz.reader import Message
from fuzz.script import Scene, What, mark_of, marks, marks_in, scene, scenes
from fuzz.stage import MAX_CLIENTS, MAX_SCENES, TIMEOUTS, Served, Stage

_REMOVED = frozenset((b"x-client-cert", b"x-client-verify"))
_OWN = (b"x-dstack-app-id", b"x-forwarded-proto", b"x-real-ip", b"x-forwarded-for")
_KNOWN = {b"x-dstack-app-id", b"x-forwarded-proto", b"x-real-ip", b"x-forwarded-for"}
_SHOWN = (
    Shown.TARGET,
    Shown.TARGET,
    Shown.OTHER_APP,
    Shown.OTHER_KMS,
    Shown.NO_CHAIN,
    Shown.NOTHING,
    Shown.RESUMED,
)

_C, _S = What.CLIENT_SENDS, What.SERVER_SENDS
_GET = b"\xfcX-A: \xfe\r\n\r\n"
_OK = b"\xfa\xfe__"

SEEDS = (
    # A 101 that answers nothing, behind whole answers on a connection that asked to upgrade.
    scene(_C, 0, b"\xfc\xf6X-A: \xfe\r\n\r\n")
    + scene(_S, 0, _OK)
    + scene(_C, 0, _GET)
    + scene(_S, 0, _OK)
    + scene(_S, 0, b"\xf5\xfe"),
    # The same, where the last request did not ask for it.
    scene(_C, 0, b"\xfc\xf6X-A: \xfe\r\n\r\n")
    + scene(_S, 0, _OK)
    + scene(_C, 0, _GET)
    + scene(_S, 0, b"\xfa\xfe]_")
    + scene(_C, 0, _GET)
    + scene(_S, 0, b"\xf5\xfe"),
    # And where the 101 cannot be read.
    scene(_C, 0, b"\xfc\xf6X-A: \xfe\r\n\r\n")
    + scene(_S, 0, _OK)
    + scene(_C, 0, _GET)
    + scene(_S, 0, b"\xfa\xfe]_")
    + scene(_C, 0, _GET)
    + scene(_S, 0, b"HTTP/1.1 101 Switching Protocols\r\n\xf5\xfe"),
    # TLS has no half of an end: the answer breaks off with the request's close-notify.
    scene(_C, 0, _GET) + scene(_S, 0, b"\xfa\xfe_") + scene(What.CLIENT_ENDS),
    scene(_C, 0, _GET) + scene(_S, 0, _OK),
    scene(_C, 0, _GET)
    + scene(_S, 0, _OK)
    + scene(What.ACCEPT, 2)
    + scene(_C, 1, _GET)
    + scene(_S, 0, _OK),
    *(scene(What.ACCEPT, who) + scene(_C, 1, _GET) + scene(_S, 0, _OK) for who in range(7)),
    scene(
        _C,
        0,
        b"\xfcx_dstack_app_id: 1\r\nX-Forwarded-For: 9\r\nX-Real.IP: 2\r\nX-A: \xfe\r\n"
        b"Connection: x-dstack-app-id, x-forwarded-for\r\nX-Client-Cert: a\r\n\r\n",
    ),
    scene(_C, 0, b"\xf7\xf9\r\n2\r\n\xfe\r\n0\r\nX-Dstack-App-Id: 1\r\nX-A: 2\r\n\r\n")
    + scene(_S, 0, _OK),
    scene(_C, 0, b"\xf7Content-Length: 4\r\n\r\n\xfe") + scene(_S, 0, _OK) + scene(_C, 0, b"ab"),
    scene(_C, 0, b"\xfc\xf6X-A: \xfe\r\n\r\n")
    + scene(_S, 0, b"\xf5\xfe")
    + scene(_C, 0, b"\xfe")
    + scene(What.ACCEPT)
    + scene(_C, 1, _GET)
    + scene(_S, 0, _OK)
    + scene(_S, 1, b"\xfe"),
    scene(_C, 0, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + _GET) + scene(_S, 0, _OK),
    scene(_C, 0, b"GET / HTTP/1.0\r\nX-A: \xfe\r\n\r\n")
    + scene(_S, 0, b"HTTP/1.1 200 OK\r\n\xf9\r\n2\r\n\xfe\r\n\xf4"),
    scene(_C, 0, _GET)
    + scene(_S, 0, b"HTTP/1.0 200 OK\r\nX-Dstack-Mesh-Error: 1\r\n\r\n\xfe")
    + scene(What.SERVER_ENDS),
    scene(_C, 0, _GET)
    + scene(_S, 0, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n\xfe")
    + scene(What.SERVER_BREAKS),
    scene(_C, 0, _GET)
    + scene(_S, 0, b"HTTP/1.1 200 OK\r\n\xf9\r\n2\r\n\xfe\r\n")
    + scene(What.SERVER_BREAKS),
    scene(_C, 0, _GET) + scene(What.TIME, 3) + scene(_S, 0, _OK),
    scene(_C, 0, _GET)
    + scene(_S, 0, _OK + _OK)
    + scene(What.ACCEPT)
    + scene(_C, 1, _GET)
    + scene(_S, 0, _OK),
    scene(What.REFUSE)
    + scene(_C, 0, _GET)
    + scene(What.REFUSE, 1)
    + scene(_C, 0, _GET)
    + scene(_S, 0, _OK),
    scene(What.CLIENT_STALLS)
    + scene(_C, 0, _GET * 2)
    + scene(_S, 0, _OK)
    + scene(What.CLIENT_FLOWS)
    + scene(_S, 0, _OK),
    scene(_C, 0, _GET) + scene(What.RENEWAL) + scene(_S, 0, _OK) + scene(_C, 0, _GET),
    scene(_C, 0, b"GET http://b/x HTTP/1.1\r\nHost: a\r\nX-A: \xfe\r\n\r\n")
    + scene(_S, 0, b"HTTP/1.1 204 No\r\n\r\n"),
    scene(_C, 0, b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
    + scene(_S, 0, b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"),
)


class _Inbound(Stage):
    mesh: InboundMesh

    def __init__(self) -> None:
        super().__init__(InboundMesh(timeouts=TIMEOUTS), _REMOVED)
        self.apps = [TARGET.encode()]
        """The app-id that each caller has proved; empty for none."""

    def play(self, one: Scene) -> None:
        if one.what is What.ACCEPT:
            if len(self.mesh.clients) < MAX_CLIENTS:
                shown = _SHOWN[one.who % len(_SHOWN)]
                self.mesh.accept(TARGET, shown)
                proved = {Shown.TARGET: TARGET, Shown.OTHER_APP: OTHER}.get(shown)
                self.apps.append(proved.encode() if proved else b"")
        elif one.what is What.RENEWAL:
            self.mesh.identity.current = replace(self.mesh.identity.require())
            self.mesh.loop.do(self.mesh.pool.drain)
        elif one.what is What.REFUSE:
            self.mesh.loop.accepts = bool(one.who & 1)
        elif one.what is not What.VERIFY:
            super().play(one)

    def check_request(self, message: Message, served: Served) -> None:
        super().check_request(message, served)
        app_id, proto, address, path = (message.named(name) for name in _OWN)
        assert proto == [b"https"]
        assert address == [CALLER_ADDRESS.encode()]
        assert len(path) == 1
        assert path[0].split(b", ")[-1] == address[0]
        assert app_id in ([app] for app in self.apps if app), f"{app_id} has not called"
        for name, _ in message.fields:
            spelt = bytes(c if chr(c).isalnum() else 0x2D for c in name.lower())
            assert spelt not in _KNOWN or name.lower() == spelt, f"{name!r} went on"
        assert not [name for name, _ in message.trailers if name.lower() in _KNOWN]
        for number, app in enumerate(self.apps):
            if mark_of(number) in marks(marks_in(message)):
                assert app_id == [app], f"what {number} sent went on under another's name"

    def check(self) -> None:
        super().check()
        for number, client in enumerate(self.mesh.clients):
            if not self.apps[number]:
                assert b"HTTP/1.1 200 OK\r\n" not in client.received.replace(_HEALTH, b"")


_HEALTH = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n"


def run(data: bytes) -> None:
    stage = _Inbound()
    try:
        for one in scenes(data, MAX_SCENES):
            stage.play(one)
        stage.check()
    finally:
        stage.mesh.close()

"""What became of requests, for people: the access log, denials, and the last errors.

While the access log is off, nothing here is called for an exchange that ended well.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import Literal, NamedTuple

from dstack_mesh import errors
from dstack_mesh.errors import MeshError
from dstack_mesh.inbound.auth_service import AuthService
from dstack_mesh.log import event
from dstack_mesh.log_limit import LogLimit
from dstack_mesh.ops.report import Incident
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.tally import PeerTally

log = logging.getLogger(__name__)
access_log = logging.getLogger("dstack_mesh.access")

Access = Literal["off", "errors", "all"]

DENIALS = frozenset(
    error.code
    for error in (
        errors.AgentDenied,
        errors.ClientCertRequired,
        errors.ClientCertUntrusted,
        errors.PeerUntrusted,
        errors.PeerAppIdMismatch,
        errors.PeerRejectedUs,
    )
)
"""Errors that say no to somebody: always logged. Policy's own no is, where it is decided."""

HANDSHAKE_FAILED = "handshake_failed"
"""Stands for a code where no TLS session with a caller came about."""

_SHOWN = 256
_TARGET = b"x-dstack-target-app"
_app_id = re.compile(rb"[0-9A-Fa-f]{40}").fullmatch


class Journal:
    """One worker's. `recorder`, `failed` and `refused` are for its services: see `Service`."""

    def __init__(self, access: Access, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since 1970."""
        self.access = access
        """May be set while running; `recorder` is then to be handed to the services again."""
        self._clock = clock
        self._denials = LogLimit(log, "request_denied")
        self._handshakes = LogLimit(log, "inbound_handshake_failed")
        # Two, so that a scanner's handshakes cannot push out what an app was refused.
        self._failed: deque[Incident] = deque(maxlen=100)
        self._refused_early: deque[Incident] = deque(maxlen=30)
        # Asked for by a setting of its own, so not subject to the level of the others.
        access_log.setLevel(logging.INFO)

    @property
    def recorder(self) -> Callable[[str, Exchange], None] | None:
        """What is to be told of every exchange; None while the access log does not want all."""
        return self._write_access if self.access == "all" else None

    def incidents(self) -> list[Incident]:
        """Give the last ones, the newest first."""
        return sorted(chain(self._failed, self._refused_early), key=lambda one: -one.at)

    def failed(self, direction: str, exchange: Exchange) -> None:
        """Take an exchange that ended in an error, the mesh's or the target's own."""
        if self.access == "errors":
            self._write_access(direction, exchange)
        code = exchange.code
        if not code:
            return
        if code == errors.AgentDenied.code:
            direction = "agent"
        peer, method, path = _subject(exchange)
        incident = Incident(
            at=self._clock(),
            direction=direction,
            code=code,
            status=exchange.status,
            detail=exchange.detail[: 2 * _SHOWN],
            method=method,
            path=path,
            peer=peer,
            rule=_rule(exchange),
            request_id=_request_id(exchange),
        )
        self._failed.append(incident)
        tally = _tally(exchange)
        if tally is not None:
            tally.errors += 1
            tally.last_error = incident.at, code, incident.detail
        if code in DENIALS:
            self._denials.event(
                logging.WARNING,
                incident.peer or direction,
                direction=direction,
                code=code,
                method=incident.method,
                path=incident.path,
                peer=incident.peer or None,
                rule=incident.rule or None,
                reason=incident.detail,
                request_id=incident.request_id,
            )

    def refused(self, direction: str, error: MeshError, request_id: str) -> None:
        """Take a head that was answered with `error` before it became an exchange."""
        self._refused_early.append(
            Incident(
                at=self._clock(),
                direction=direction,
                code=error.code,
                status=error.status,
                detail=error.detail[: 2 * _SHOWN],
                request_id=request_id,
            )
        )
        if self.access != "off":
            event(
                access_log,
                logging.INFO,
                "access",
                direction=direction,
                status=error.status,
                code=error.code,
                request_id=request_id,
            )

    def handshake_failed(self, reason: str) -> None:
        """Take a caller with whom no TLS session came about."""
        self._refused_early.append(
            Incident(at=self._clock(), direction="inbound", code=HANDSHAKE_FAILED, detail=reason)
        )
        self._handshakes.event(logging.INFO, "", reason=reason)

    def _write_access(self, direction: str, exchange: Exchange) -> None:
        peer, method, path = _subject(exchange)
        started, reached = exchange.started, exchange.reached
        first = exchange.first_byte or exchange.finished
        event(
            access_log,
            logging.INFO,
            "access",
            direction=direction,
            method=method,
            path=path,
            status=exchange.status,
            code=exchange.code,
            peer=peer or None,
            rule=_rule(exchange) or None,
            seconds=round(exchange.finished - started, 6),
            connect_seconds=round(reached - started, 6) if reached else None,
            first_byte_seconds=round(first - started, 6) if exchange.status else None,
            bytes_up=exchange.bytes_up,
            bytes_down=exchange.bytes_down,
            reused=exchange.reused,
            request_id=_request_id(exchange),
        )


class _Subject(NamedTuple):
    """Who asked for what, or whom was asked: each empty where it was not told."""

    peer: str
    method: str
    path: str


def _subject(exchange: Exchange) -> _Subject:
    handler, line = exchange.handler, exchange.line
    if isinstance(handler, AuthService):
        asked = handler.asked(exchange.fields)
        return _Subject(asked.app_id, _text(asked.method), _path(asked.target))
    caller = getattr(handler, "app_id", None)  # a `Caller` has one, the outbound proxy has none
    peer = caller if isinstance(caller, str) else _target(exchange)
    return _Subject(peer, _text(line.method), _path(line.target))


def _path(target: bytes) -> str:
    return _text(target.partition(b"?")[0])


def _text(said: bytes) -> str:
    return said[:_SHOWN].decode("latin-1")


def _target(exchange: Exchange) -> str:
    """Give the target's app-id: verified where it was, else as asked for."""
    if exchange.peer is not None:
        return exchange.peer.app_id
    for name, value in exchange.fields.removed:
        if name == _TARGET and _app_id(value):
            return value.decode("ascii").lower()
    return ""


def _rule(exchange: Exchange) -> str:
    # A connection's last decision is this exchange's, unless the mesh answered by itself.
    if exchange.lane is None and exchange.code != errors.PolicyDenied.code:
        return ""
    return str(getattr(exchange.handler, "rule", ""))


def _tally(exchange: Exchange) -> PeerTally | None:
    tally = getattr(exchange.handler, "tally", None)
    if isinstance(tally, PeerTally):
        return tally
    return exchange.lane.peer if exchange.lane is not None else None


def _request_id(exchange: Exchange) -> str:
    own = exchange.request_id or _text(exchange.fields.request_id)
    return own or secrets.token_hex(16)

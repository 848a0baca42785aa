"""The auth service behind nginx's `auth_request`: who a caller is, and whether it may call.

nginx has terminated TLS and verified the caller's chain; it hands on the leaf and its own verdict
in headers. So what is said here is as true as it is nginx who asks: the listener is on loopback
or a unix socket that nothing else can reach. Our own identity plays no part in the judgement of a
leaf, whether it is valid, expired or absent; only policy's `self` needs to know who we are, and
lets nobody through while that is not known.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from dstack_mesh.errors import (
    BadRequest,
    ClientCertRequired,
    ClientCertUntrusted,
    HeaderTooLarge,
    MeshError,
    PolicyDenied,
)
from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.escaped_pem import EscapedPemError, parse_escaped_pem
from dstack_mesh.identity.leaf import identify_leaf
from dstack_mesh.identity.store import Snapshot
from dstack_mesh.inbound.denials import DenialLog
from dstack_mesh.model import PeerIdentity, Role
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.rule import UNKNOWN
from dstack_mesh.relay.answers import Answer, problem
from dstack_mesh.relay.interfaces import Handler, Plan
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.tally import PeerTallies
from dstack_mesh.wire.request import RequestFields, parse_request_fields
from dstack_mesh.wire.request_line import RequestLine

_CERTIFICATE, _VERDICT, _METHOD, _TARGET = (
    b"x-client-cert",
    b"x-client-verify",
    b"x-original-method",
    b"x-original-uri",
)
_ASKED_FOR = frozenset((_CERTIFICATE, _VERDICT, _METHOD, _TARGET))
_TEXT = "text/plain; charset=utf-8"
_SHOWN = 100
"""Bytes of what was sent to us that an answer repeats."""

Refusal = tuple[type[MeshError], str]


class OwnIdentity(Protocol):
    """What of an `IdentityStore` is needed here."""

    @property
    def current(self) -> Snapshot | None:
        """The identity in effect."""
        ...


class AuthPlan(Plan):
    """What nginx asks, as far as its field lines tell; remembered with them."""

    __slots__ = ("certificate", "method", "refusal", "target")

    def __init__(self, fields: RequestFields) -> None:
        super().__init__(fields)
        said: dict[bytes, set[bytes]] = {name: set() for name in _ASKED_FOR}
        for name, value in fields.removed:
            if name in said:  # and not a look-alike (`x_client_cert`), which says nothing
                said[name].add(value)
        self.refusal = _refusal(said)
        """Why this is no caller, whatever is in the certificate."""
        self.certificate = _one(said[_CERTIFICATE])
        self.method = _one(said[_METHOD])
        self.target = _one(said[_TARGET])
        """Method and target of the request that nginx asks about; empty where it did not say."""


class Asked:
    """What nginx's question was about; each empty where that is not known."""

    __slots__ = ("app_id", "method", "target")

    def __init__(self, app_id: str, method: bytes, target: bytes) -> None:
        self.app_id = app_id
        self.method = method
        self.target = target


def _one(values: set[bytes]) -> bytes:
    return next(iter(values), b"")


def _refusal(said: dict[bytes, set[bytes]]) -> Refusal | None:
    for name, values in said.items():
        if len(values) > 1:
            return ClientCertUntrusted, f"{name.decode()} is there with different values"
    verdict, certificate = _one(said[_VERDICT]), _one(said[_CERTIFICATE])
    if verdict == b"NONE" or not (verdict or certificate):
        return ClientCertRequired, (
            "this app answers callers with a certificate of its KMS only; call it through a mesh,"
            " by x-dstack-target-app"
        )
    if verdict != b"SUCCESS":
        shown = ascii(verdict[:_SHOWN].decode("latin-1"))
        return ClientCertUntrusted, (
            f"nginx has not verified the client certificate: x-client-verify is {shown},"
            " and SUCCESS is what is accepted"
        )
    if not certificate:
        return ClientCertRequired, "nginx sent no certificate in x-client-cert"
    return None


class KnownLeaves:
    """Finds who an escaped certificate is, and remembers the `capacity` found last.

    Only what was believed is remembered, and no longer than the leaf is valid.
    """

    def __init__(self, *, capacity: int = 1024, clock: Callable[[], float] = time.time) -> None:
        self._capacity = capacity
        self._clock = clock
        self._found: OrderedDict[bytes, PeerIdentity] = OrderedDict()

    def identify(self, escaped: bytes) -> PeerIdentity:
        """Return who it is. Raises `EscapedPemError` or `ChainRuleBroken`."""
        now = self._clock()
        key = hashlib.sha256(escaped).digest()
        found = self._found.get(key)
        if found is not None and now < found.not_after:
            self._found.move_to_end(key)
            return found
        found = identify_leaf(parse_escaped_pem(escaped), Role.CALLER, now)
        self._found[key] = found
        if len(self._found) > self._capacity:
            self._found.popitem(last=False)
        return found


class AuthService(Handler[AuthPlan]):
    """The handler of all connections of the auth listener."""

    def __init__(
        self,
        identity: OwnIdentity,
        policy: Current,
        count_decision: Callable[[str], None] = lambda decision: None,
        leaves: KnownLeaves | None = None,
    ) -> None:
        """`count_decision` is called with each decision of policy: `allow`, `deny` or `audit`."""
        self._identity = identity
        self._current = policy
        self._denials = DenialLog()
        self._count_decision = count_decision
        self._leaves = leaves or KnownLeaves()
        self.peers = PeerTallies()
        """By the caller's app-id."""

    # What a connection calls: see `downstream.Handler`.

    def plan(self, line: RequestLine, block: bytes) -> AuthPlan:
        """See `Handler`. nginx knows no other denial than 401 and 403, so neither does this."""
        try:
            return AuthPlan(parse_request_fields(block, line.minor, _ASKED_FOR, line.authority))
        except (BadRequest, HeaderTooLarge) as error:
            raise ClientCertUntrusted(f"nginx's question cannot be read: {error}") from error

    def route(self, line: RequestLine, plan: AuthPlan, last: Route | None = None) -> Answer:
        """See `Handler`."""
        path = line.target.partition(b"?")[0]
        try:
            if line.method not in (b"GET", b"HEAD") or path not in (b"/auth", b"/health"):
                raise PolicyDenied("this is the auth service for nginx: GET /auth and GET /health")
            if path == b"/health":
                return Answer(200, b"OK\n", _TEXT)
            peer = self._caller(plan)
            self.peers.get(peer.app_id).requests += 1
            self._authorise(peer, plan)
        except MeshError as error:
            return _refused(error, plan.fields.request_id[:_SHOWN].decode("latin-1"))
        return Answer(
            200, b"", _TEXT, fields=b"x-dstack-app-id: %b\r\n" % peer.app_id.encode("ascii")
        )

    def asked(self, fields: RequestFields) -> Asked:
        """Tell for the log what nginx's question was about."""
        plan = AuthPlan(fields)
        try:
            app_id = str(self._caller(plan).app_id)
        except MeshError:
            app_id = ""
        return Asked(app_id, plan.method, plan.target)

    def _caller(self, plan: AuthPlan) -> PeerIdentity:
        if plan.refusal is not None:
            kind, detail = plan.refusal
            raise kind(detail)
        try:
            return self._leaves.identify(plan.certificate)
        except EscapedPemError as wrong:
            raise ClientCertUntrusted(f"x-client-cert is not one certificate: {wrong}") from wrong
        except ChainRuleBroken as error:
            raise ClientCertUntrusted(f"the client certificate is not trusted: {error}") from error

    def _authorise(self, peer: PeerIdentity, plan: AuthPlan) -> None:
        """Policy's no is 403 whatever the reason: nginx knows no 400 here."""
        own = self._identity.current
        own_id = own.app_id if own is not None else UNKNOWN
        decision = self._current.policy.decide(peer, own_id, plan.method, plan.target)
        self._count_decision(decision.verdict)
        if decision.allowed and not decision.audited:
            return
        self._denials.add(decision, peer, plan.method, plan.target, plan.fields.request_id)
        if not decision.allowed:
            raise PolicyDenied(decision.why)


def _refused(error: MeshError, request_id: str) -> Answer:
    """Make the problem answer; nginx drops its body, and passes it on from a header."""
    answer = problem(error, request_id)
    answer.fields += b"x-dstack-mesh-problem: %b\r\n" % answer.body.rstrip(b"\n")
    return answer

"""The embedded terminator: mTLS from other CVMs, verified, forwarded in plain to the backend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from dstack_mesh.errors import (
    BadRequest,
    ClientCertRequired,
    ClientCertUntrusted,
    MeshError,
    PolicyDenied,
)
from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.inbound.denials import DenialLog
from dstack_mesh.model import Address, PeerIdentity, Role
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.decide import NOT_NORMAL, Policy
from dstack_mesh.policy.path import PathError
from dstack_mesh.policy.route import NO_ROUTES, Routes
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.dial import PlainConnector, authority
from dstack_mesh.relay.interfaces import Handler, Plan
from dstack_mesh.relay.lane import Lane, Route
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.tally import PeerTallies, PeerTally
from dstack_mesh.wire.request import RequestFields, parse_request_fields
from dstack_mesh.wire.request_line import RequestLine
from dstack_mesh.wire.translate import ResponseRules

_FORWARDED_FOR = b"x-forwarded-for"
_REMOVE = frozenset(
    (
        b"x-client-cert",
        b"x-client-verify",
        b"x-dstack-app-id",
        _FORWARDED_FOR,  # put on again with the caller's address behind what it said
        b"x-forwarded-proto",
        b"x-real-ip",
    )
)


class InboundPlan(Plan):
    """What a request's field lines mean to this side; remembered with them."""

    __slots__ = ("forwarded_for",)

    def __init__(self, fields: RequestFields) -> None:
        super().__init__(fields)
        said = [value for name, value in fields.removed if name == _FORWARDED_FOR and value]
        self.forwarded_for = b", ".join([*said, b""])
        """What the caller said, ready for an address to be put behind it."""


@dataclass(frozen=True, slots=True)
class InboundOptions:
    """What of the settings this side needs. Times in seconds."""

    backend: Address
    """Where requests go that no route takes."""

    policy: Current
    connect_timeout: float


class Terminator:
    """What all connections of the inbound listener share."""

    def __init__(
        self,
        pool: Pool,
        identity: IdentityStore,
        options: InboundOptions,
        count_decision: Callable[[str], None] = lambda decision: None,
    ) -> None:
        """`count_decision` is called with each decision of policy: `allow`, `deny` or `audit`."""
        self.count_decision = count_decision
        self.peers = PeerTallies()
        """By the caller's app-id."""
        self.identity = identity
        self.current = options.policy
        self.denials = DenialLog()
        self.rules = ResponseRules(remote_errors=False)
        self._pool = pool
        self._connect_timeout = options.connect_timeout
        self._backends: dict[Address, tuple[Lane, bytes]] = {}
        self.lane, self.host = self._reach(options.backend)
        """Of the backend that takes what no route does."""

    def handler(self, snapshot: Snapshot) -> Caller:
        """Make the handler of a connection that was accepted under `snapshot`."""
        return Caller(self, snapshot)

    def choose(self, routes: Routes, host: bytes | None, target: bytes) -> tuple[Lane, bytes]:
        """Give the lane and the authority of the backend that `routes` choose.

        Raises `BadRequest` where the path could mean another, and a route goes by paths.
        """
        try:
            address = routes.choose(host, target)
        except PathError as error:
            raise BadRequest(NOT_NORMAL.format(error)) from error
        if address is None:
            return self.lane, self.host
        return self._backends.get(address) or self._reach(address)

    def _reach(self, address: Address) -> tuple[Lane, bytes]:
        lane = self._pool.lane(
            ("backend", address),
            lambda: PlainConnector(address, self._connect_timeout, "the backend"),
        )
        found = self._backends[address] = (lane, authority(address))
        return found


_NOBODY = (
    "this app answers callers with a certificate of its KMS only; call it through"
    " a mesh, by x-dstack-target-app"
)


class Caller(Handler[InboundPlan]):
    """One caller's connection: its identity was settled in the handshake."""

    __slots__ = (
        "_not_after",
        "_own_fields",
        "_peer",
        "_refusal",
        "_shared",
        "_snapshot",
        "_welcome",
        "_welcome_line",
        "rule",
        "tally",
    )

    def __init__(self, shared: Terminator, snapshot: Snapshot) -> None:
        self._shared = shared
        self._snapshot = snapshot
        self._peer: PeerIdentity | None = None
        # Made anew for each request: one that was raised keeps all frames it went through.
        self._refusal: tuple[type[MeshError], str] | None = None
        self._own_fields = (b"", b"")
        self._welcome: Policy | None = None
        """A policy that is known to let this caller through: it need not be asked again."""
        self._welcome_line: RequestLine | None = None
        """What it may ask again, where it is not all; a head that is repeated has one line."""
        self._not_after = 0.0
        self.rule = ""
        """The rule that let the last request through or denied it, for logs; empty for none."""
        self.tally: PeerTally | None = None
        """Where the caller's requests are counted; None while there is none that is valid."""

    def connected(self, transport: asyncio.Transport) -> None:
        """See `Handler`."""
        tls = transport.get_extra_info("ssl_object")
        try:
            self._peer = self._snapshot.peers.identify(tls, Role.CALLER)
        except ChainRuleBroken as error:
            reason = f"the client certificate is not trusted: {error}"
            self._refusal = ClientCertUntrusted, reason
            return
        if self._peer is None:
            self._refusal = ClientCertRequired, _NOBODY
            return
        self.tally = self._shared.peers.get(self._peer.app_id)
        peer_address = transport.get_extra_info("peername")
        host = str(peer_address[0]) if peer_address else "127.0.0.1"
        address = host.removeprefix("::ffff:").encode("ascii")
        self._own_fields = (
            address,
            b"x-forwarded-proto: https\r\nx-real-ip: %b\r\nx-dstack-app-id: %b\r\n"
            % (address, self._peer.app_id.encode("ascii")),
        )

    @property
    def app_id(self) -> str:
        """The caller's verified app-id; empty where it showed none that is valid."""
        return self._peer.app_id if self._peer is not None else ""

    def may_persist(self) -> bool:
        """See `Handler`: an older identity's connections end with their next response."""
        return self._shared.identity.current is self._snapshot

    def plan(self, line: RequestLine, block: bytes) -> InboundPlan:
        """See `Handler`."""
        return InboundPlan(parse_request_fields(block, line.minor, _REMOVE, line.authority))

    def route(
        self, line: RequestLine, plan: InboundPlan, last: Route | None = None
    ) -> Route | Answer:
        """See `Handler`."""
        if line.target.partition(b"?")[0] == b"/health" and line.method in (b"GET", b"HEAD"):
            return Answer(200, b"OK\n", "text/plain; charset=utf-8")
        tally = self.tally
        if tally is not None:
            tally.requests += 1
        shared = self._shared
        current = shared.current
        welcome = current.policy is self._welcome and (
            self._welcome_line is None or self._welcome_line is line
        )
        if welcome and time.time() < self._not_after:
            shared.count_decision("allow")
        else:
            self._authorise(current.policy, line, plan)
        lane, host = shared.lane, shared.host
        if current.routes is not NO_ROUTES:
            lane, host = shared.choose(current.routes, plan.fields.host, line.target)
        elif last is not None and last.lane is lane:  # it may be from when there were routes
            return last
        address, own = self._own_fields
        head = b"%b %b HTTP/1.1\r\n%b%bx-forwarded-for: %b%b\r\n%b\r\n" % (
            line.method,
            line.target,
            b"" if plan.fields.host is not None else b"Host: %b\r\n" % host,
            plan.fields.forwarded,
            plan.forwarded_for,
            address,
            own,
        )
        return Route(lane, head, shared.rules, _REMOVE)

    def _authorise(self, policy: Policy, line: RequestLine, plan: InboundPlan) -> None:
        if self._refusal is not None:
            kind, reason = self._refusal
            raise kind(reason)
        peer = self._peer
        if peer is None:
            raise ClientCertRequired("no client certificate was shown")
        if time.time() >= peer.not_after:
            raise ClientCertUntrusted("the client certificate has expired since it was shown")
        shared = self._shared
        decision = policy.decide(peer, self._snapshot.app_id, line.method, line.target)
        shared.count_decision(decision.verdict)
        self.rule = decision.rule or ""
        if decision.allowed and not decision.audited:
            self._welcome, self._not_after = policy, peer.not_after
            self._welcome_line = None if policy.asks_who_only else line
            return
        self._welcome = None
        shared.denials.add(decision, peer, line.method, line.target, plan.fields.request_id)
        if not decision.allowed:
            raise (BadRequest if decision.malformed else PolicyDenied)(decision.why)

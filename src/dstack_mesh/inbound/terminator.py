"""The embedded terminator: mTLS from other CVMs, verified, forwarded in plain to the backend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from dstack_mesh.errors import ClientCertRequired, ClientCertUntrusted, MeshError, PolicyDenied
from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.model import Address, PeerIdentity, Role
from dstack_mesh.policy.allow import Allow
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.dial import PlainConnector, authority
from dstack_mesh.relay.interfaces import Handler, Plan
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.pool import Pool
from dstack_mesh.wire.request import RequestFields, RequestLine, parse_request_fields
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
    allow: Allow
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
        """`count_decision` is called with `allow` or `deny` for each decision of policy."""
        self.count_decision = count_decision
        self.identity = identity
        self.allow = options.allow
        """Read anew for each request; a reload puts another in its place."""
        self.rules = ResponseRules(remote_errors=False)
        self.host = authority(options.backend)
        self.lane = pool.lane(
            ("backend", options.backend),
            lambda: PlainConnector(options.backend, options.connect_timeout, "the backend"),
        )

    def handler(self, snapshot: Snapshot) -> Caller:
        """Make the handler of a connection that was accepted under `snapshot`."""
        return Caller(self, snapshot)


class Caller(Handler[InboundPlan]):
    """One caller's connection: its identity was settled in the handshake."""

    __slots__ = ("_own_fields", "_peer", "_refusal", "_shared", "_snapshot")

    def __init__(self, shared: Terminator, snapshot: Snapshot) -> None:
        self._shared = shared
        self._snapshot = snapshot
        self._peer: PeerIdentity | None = None
        self._refusal: MeshError | None = None
        self._own_fields = (b"", b"")

    def connected(self, transport: asyncio.Transport) -> None:
        """See `Handler`."""
        tls = transport.get_extra_info("ssl_object")
        try:
            self._peer = self._snapshot.peers.identify(tls, Role.CALLER)
        except ChainRuleBroken as error:
            self._refusal = ClientCertUntrusted(f"the client certificate is not trusted: {error}")
            return
        if self._peer is None:
            self._refusal = ClientCertRequired(
                "this app answers callers with a certificate of its KMS only; call it through"
                " a mesh, by x-dstack-target-app"
            )
            return
        peer_address = transport.get_extra_info("peername")
        host = str(peer_address[0]) if peer_address else "127.0.0.1"
        address = host.removeprefix("::ffff:").encode("ascii")
        self._own_fields = (
            address,
            b"x-forwarded-proto: https\r\nx-real-ip: %b\r\nx-dstack-app-id: %b\r\n"
            % (address, self._peer.app_id.encode("ascii")),
        )

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
        self._authorise()
        if last is not None:
            return last
        address, own = self._own_fields
        shared = self._shared
        head = b"%b %b HTTP/1.1\r\n%b%bx-forwarded-for: %b%b\r\n%b\r\n" % (
            line.method,
            line.target,
            b"" if plan.fields.host is not None else b"Host: %b\r\n" % shared.host,
            plan.fields.forwarded,
            plan.forwarded_for,
            address,
            own,
        )
        return Route(shared.lane, head, shared.rules, _REMOVE)

    def _authorise(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        peer = self._peer
        if peer is None:
            raise ClientCertRequired("no client certificate was shown")
        if time.time() >= peer.not_after:
            raise ClientCertUntrusted("the client certificate has expired since it was shown")
        own = self._snapshot.app_id
        allowed = self._shared.allow.permits(peer.app_id, own)
        self._shared.count_decision("allow" if allowed else "deny")
        if not allowed:
            raise PolicyDenied(self._shared.allow.denial(peer.app_id))

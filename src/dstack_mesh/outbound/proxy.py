"""The local application's side: to another app, to the guest agent, or the mesh's own answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dstack_mesh.dstack.gateway import GatewayDirectory
from dstack_mesh.errors import AgentDenied, AgentUnavailable
from dstack_mesh.gateway_domain import Gateway
from dstack_mesh.identity.store import IdentityStore
from dstack_mesh.model import Address, Target, TcpAddress
from dstack_mesh.outbound.agent_calls import agent_path, exposed
from dstack_mesh.outbound.connect import MeshConnector, OpenTls
from dstack_mesh.outbound.target import endpoint, parse_target
from dstack_mesh.relay.answers import Answer, json_answer
from dstack_mesh.relay.dial import PlainConnector, authority
from dstack_mesh.relay.interfaces import Handler, Plan
from dstack_mesh.relay.lane import Lane, Route
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.tally import PeerTallies, PeerTally, Tally
from dstack_mesh.relay.tls_client import open_tls
from dstack_mesh.wire.fields import Field
from dstack_mesh.wire.request import RequestFields, parse_request_fields
from dstack_mesh.wire.request_line import RequestLine
from dstack_mesh.wire.translate import ResponseRules

_HEADERS = (b"x-dstack-target-app", b"x-dstack-target-port", b"x-dstack-target-instance")
_REMOVE = frozenset(_HEADERS)
_MAX_DESTINATIONS = 512


@dataclass(frozen=True, slots=True)
class OutboundOptions:
    """What of the settings this side needs. Times in seconds."""

    default_port: int
    expose_agent: Literal["all", "info", "none"]
    agent: Address
    gateway_connect: TcpAddress | None
    connect_timeout: float


class OutboundPlan(Plan):
    """What a request's field lines mean to this side; remembered with them."""

    __slots__ = ("destination",)

    def __init__(self, fields: RequestFields) -> None:
        super().__init__(fields)
        self.destination: Destination | None = None


class Destination:
    """What certain values of the target headers lead to."""

    __slots__ = ("gateway", "host", "lane", "peer", "target")

    def __init__(self, target: Target, peer: PeerTally) -> None:
        self.target = target
        self.peer = peer
        self.host = b"%b-%ds" % (target.app_id.encode("ascii"), target.port)
        """`Host` for a request that came without."""
        self.gateway: Gateway | None = None
        """The gateway that `lane` was looked up for; None as long as it was not."""
        self.lane: Lane

    def lead_to(self, gateway: Gateway, lane: Lane) -> None:
        """Take another gateway's lane."""
        self.lane, self.gateway = lane, gateway


class OutboundProxy(Handler[OutboundPlan]):
    """The handler of all connections of the outbound listener."""

    def __init__(
        self,
        pool: Pool,
        identity: IdentityStore,
        directory: GatewayDirectory,
        options: OutboundOptions,
        count_handshake: Callable[[str], None] = lambda result: None,
        agent_tally: Tally | None = None,
        open_tls: OpenTls = open_tls,
    ) -> None:
        """`count_handshake`: see `MeshConnector`. `agent_tally` counts calls of the guest agent."""
        self.peers = PeerTallies()
        """By `{app-id}:{port}`, or `{app-id}:{port}/{instance-id}`."""
        self._pool = pool
        self._identity = identity
        self._directory = directory
        self._options = options
        self._count_handshake = count_handshake
        self._open_tls = open_tls
        self._destinations: dict[tuple[Field, ...], Destination] = {}
        self._target_rules = ResponseRules(remote_errors=True)
        self._agent_rules = ResponseRules(remote_errors=False)
        self._agent_lane = pool.lane(
            ("agent", options.agent),
            lambda: PlainConnector(
                options.agent, options.connect_timeout, "the guest agent", AgentUnavailable
            ),
            agent_tally,
        )

    # What a connection calls: see `downstream.Handler`.

    def plan(self, line: RequestLine, block: bytes) -> OutboundPlan:
        """See `Handler`."""
        return OutboundPlan(parse_request_fields(block, line.minor, _REMOVE, line.authority))

    def route(
        self, line: RequestLine, plan: OutboundPlan, last: Route | None = None
    ) -> Route | Answer:
        """See `Handler`."""
        if plan.fields.removed:
            return self._to_target(line, plan, last)
        return self._own(line) or self._to_agent(line, plan.fields)

    # The three ways.

    def _to_target(
        self, line: RequestLine, plan: OutboundPlan, last: Route | None = None
    ) -> Route | Answer:
        destination = plan.destination
        if destination is None:
            said = tuple(plan.fields.removed)
            destination = plan.destination = self._destinations.get(said) or self._read(said)
            if destination is None:
                # Only look-alikes (`x_dstack_target_app`): taken out, and no reason to route.
                return self._own(line) or self._to_agent(line, plan.fields)
        destination.peer.requests += 1
        self._identity.require()
        gateway = self._directory.current or self._directory.require()
        if destination.gateway is not gateway or destination.lane.retired:
            destination.lead_to(gateway, self._lane(destination, gateway))
        if last is not None and last.lane is destination.lane:
            return last
        head = _head(line, line.target, plan.fields, destination.host)
        return Route(destination.lane, head, self._target_rules, _REMOVE)

    def _read(self, said: tuple[Field, ...]) -> Destination | None:
        """Understand target headers that have not been seen before, or not lately."""
        apps, ports, instances = (
            [value for name, value in said if name == header] for header in _HEADERS
        )
        target = parse_target(apps, ports, instances, self._options.default_port)
        if target is None:
            return None
        if len(self._destinations) >= _MAX_DESTINATIONS:
            self._destinations.clear()
        destination = self._destinations[said] = Destination(target, self._peer(target))
        return destination

    def _peer(self, target: Target) -> PeerTally:
        instance = f"/{target.instance_id}" if target.instance_id else ""
        return self.peers.get(f"{target.app_id}:{target.port}{instance}")

    def _own(self, line: RequestLine) -> Answer | None:
        path = line.target.partition(b"?")[0]
        if path == b"/health" and line.method in (b"GET", b"HEAD"):
            return Answer(200, b"OK\n", "text/plain; charset=utf-8")
        if path == b"/gateway":
            self._directory.require()
            return json_answer(200, {"gateway_domain": self._directory.text})
        return None

    def _to_agent(self, line: RequestLine, fields: RequestFields) -> Route:
        path, question, query = line.target.partition(b"?")
        call = agent_path(path)
        if not exposed(call, self._options.expose_agent):
            raise AgentDenied(
                f"the guest agent's call {call[:80].decode('latin-1')!a} is not offered to"
                f" the application: MESH_AGENT_EXPOSE is {self._options.expose_agent}."
                " A request to another app names it in x-dstack-target-app"
            )
        head = _head(line, call + question + query, fields, authority(self._options.agent))
        return Route(self._agent_lane, head, self._agent_rules, _REMOVE)

    def _lane(self, destination: Destination, gateway: Gateway) -> Lane:
        where = endpoint(destination.target, gateway, self._options.gateway_connect)
        return self._pool.lane(
            where,
            lambda: MeshConnector(
                where,
                self._identity,
                self._options.connect_timeout,
                self._directory.connection_failed,
                self._count_handshake,
                self._open_tls,
            ),
            peer=destination.peer,
        )


def _head(line: RequestLine, target: bytes, fields: RequestFields, host: bytes) -> bytes:
    if fields.host is None:  # RFC 9112 3.2: an HTTP/1.0 request may come without, ours may not
        return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (
            line.method,
            target,
            host,
            fields.forwarded,
        )
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (line.method, target, fields.forwarded)

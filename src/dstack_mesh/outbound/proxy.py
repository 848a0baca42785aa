"""The local application's side: to another app, to the guest agent, or the mesh's own answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dstack_mesh.dstack.gateway import GatewayDirectory
from dstack_mesh.errors import AgentDenied, AgentUnavailable
from dstack_mesh.gateway_domain import Gateway
from dstack_mesh.identity.store import IdentityStore
from dstack_mesh.model import Address, Target, TcpAddress
from dstack_mesh.outbound.agent_calls import agent_path, exposed
from dstack_mesh.outbound.connect import MeshConnector
from dstack_mesh.outbound.target import Endpoint, endpoint, parse_target
from dstack_mesh.relay.answers import Answer, json_answer
from dstack_mesh.relay.dial import PlainConnector, authority
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.upstream import Lane, Route
from dstack_mesh.wire.memo import BlockMemo
from dstack_mesh.wire.request import RequestFields, RequestLine, parse_request_fields
from dstack_mesh.wire.translate import ResponseRules

_APP, _PORT, _INSTANCE = (
    b"x-dstack-target-app",
    b"x-dstack-target-port",
    b"x-dstack-target-instance",
)
_REMOVE = frozenset((_APP, _PORT, _INSTANCE))


@dataclass(frozen=True, slots=True)
class OutboundOptions:
    """What of the settings this side needs. Times in seconds."""

    default_port: int
    expose_agent: Literal["all", "info", "none"]
    agent: Address
    gateway_connect: TcpAddress | None
    connect_timeout: float


class OutboundPlan:
    """What a request's field lines mean to this side; remembered with them."""

    __slots__ = ("fields", "gateway", "lane", "target", "values")

    def __init__(self, fields: RequestFields) -> None:
        self.fields = fields
        self.lane: Lane | None = None
        self.gateway: Gateway | None = None
        """The gateway that `lane` was looked up for."""
        self.target: Target | None = None
        self.values = {
            name: [value for removed, value in fields.removed if removed == name]
            for name in _REMOVE
        }


class OutboundProxy:
    """The handler of all connections of the outbound listener."""

    def __init__(
        self,
        pool: Pool,
        identity: IdentityStore,
        directory: GatewayDirectory,
        options: OutboundOptions,
        count_handshake: Callable[[str], None] = lambda result: None,
    ) -> None:
        self._pool = pool
        self._identity = identity
        self._directory = directory
        self._options = options
        self._count_handshake = count_handshake
        self._plans: BlockMemo[OutboundPlan] = BlockMemo(
            lambda block: OutboundPlan(parse_request_fields(block, 1, _REMOVE))
        )
        self._target_rules = ResponseRules(remote_errors=True)
        self._agent_rules = ResponseRules(remote_errors=False)
        self._agent_lane = pool.lane(
            ("agent", options.agent),
            lambda: PlainConnector(
                options.agent, options.connect_timeout, "the guest agent", AgentUnavailable
            ),
        )

    # What a connection calls: see `downstream.Handler`.

    def connected(self, transport: asyncio.Transport) -> None:
        """See `Handler`."""

    def may_persist(self) -> bool:
        """See `Handler`."""
        return True

    def plan(self, line: RequestLine, block: bytes) -> OutboundPlan:
        """See `Handler`."""
        if line.minor and line.authority is None:
            return self._plans.get(block)
        return OutboundPlan(parse_request_fields(block, line.minor, _REMOVE, line.authority))

    def route(self, line: RequestLine, plan: OutboundPlan) -> Route | Answer:
        """See `Handler`."""
        if plan.fields.removed:
            return self._to_target(line, plan)
        return self._own(line) or self._to_agent(line, plan.fields)

    # The three ways.

    def _to_target(self, line: RequestLine, plan: OutboundPlan) -> Route | Answer:
        if plan.target is None:
            values = plan.values
            plan.target = parse_target(
                values[_APP], values[_PORT], values[_INSTANCE], self._options.default_port
            )
        if plan.target is None:
            # Only look-alikes (`x_dstack_target_app`): taken out, and no reason to route.
            return self._own(line) or self._to_agent(line, plan.fields)
        self._identity.require()
        gateway = self._directory.require()
        lane = plan.lane
        if lane is None or plan.gateway is not gateway:
            lane = plan.lane = self._lane(
                endpoint(plan.target, gateway, self._options.gateway_connect)
            )
            plan.gateway = gateway
        host = b"%b-%ds" % (plan.target.app_id.encode("ascii"), plan.target.port)
        head = _head(line, line.target, plan.fields, host)
        return Route(lane, head, self._target_rules, _REMOVE)

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

    def _lane(self, where: Endpoint) -> Lane:
        return self._pool.lane(
            where,
            lambda: MeshConnector(
                where,
                self._identity,
                self._options.connect_timeout,
                self._directory.connection_failed,
                self._count_handshake,
            ),
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

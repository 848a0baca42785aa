from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from tests.identities import APP_A, APP_B, FakeIdentity, snapshot_of

from dstack_mesh.errors import (
    AgentDenied,
    AgentUnavailable,
    BadRequest,
    BadTarget,
    GatewayUnknown,
    IdentityUnavailable,
    MeshError,
)
from dstack_mesh.gateway_domain import FixedGateway, Gateway, GatewayDomain
from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.outbound.connect import MeshConnector
from dstack_mesh.outbound.proxy import OutboundOptions, OutboundProxy
from dstack_mesh.outbound.target import Endpoint
from dstack_mesh.relay.answers import Answer
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.dial import PlainConnector
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.worker import Worker
from dstack_mesh.sim.kms import Kms
from dstack_mesh.wire.request_line import parse_request_line

OTHER = "cc" * 20
INSTANCE = "11" * 20
DOMAIN = GatewayDomain("apps.example", 8443)
AGENT = UnixAddress("/run/dstack.sock")


class FakeDirectory:
    def __init__(self, gateway: Gateway | None) -> None:
        self.current = gateway
        self.failures = 0

    @property
    def text(self) -> str | None:
        return self.current.text if self.current else None

    def require(self) -> Gateway:
        if self.current is None:
            raise GatewayUnknown("none was put there")
        return self.current

    def connection_failed(self) -> None:
        self.failures += 1


class Rig:
    """A proxy that is asked where requests go; no connection is opened."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.identity = FakeIdentity(snapshot)
        self.directory = FakeDirectory(DOMAIN)
        self.worker = Worker(asyncio.get_running_loop(), Timeouts())
        self.pool = Pool(self.worker)
        self.proxy = self.make()

    def make(
        self,
        expose: str = "all",
        agent: Address = AGENT,
        gateway_connect: TcpAddress | None = None,
    ) -> OutboundProxy:
        self.proxy = OutboundProxy(
            self.pool,
            self.identity,  # type: ignore[arg-type]
            self.directory,  # type: ignore[arg-type]
            OutboundOptions(443, expose, agent, gateway_connect, 3.0),  # type: ignore[arg-type]
        )
        return self.proxy

    def ask(self, line: str, *fields: str, host: str = "Host: x.example") -> Route | Answer:
        parsed = parse_request_line(line.encode("latin-1"))
        block = "".join(f"{field}\r\n" for field in (host, *fields) if field).encode("latin-1")
        return self.proxy.route(parsed, self.proxy.plan(parsed, block))

    def route(self, line: str, *fields: str, host: str = "Host: x.example") -> Route:
        route = self.ask(line, *fields, host=host)
        assert isinstance(route, Route)
        return route

    def fails(self, error: type[MeshError], line: str, *fields: str) -> str:
        with pytest.raises(error) as caught:
            self.ask(line, *fields)
        return caught.value.detail


def endpoint_of(route: Route) -> Endpoint:
    connector = route.lane.connector
    assert isinstance(connector, MeshConnector)
    return connector._endpoint


def goes_to_agent(route: Route | Answer) -> bool:
    return isinstance(route, Route) and isinstance(route.lane.connector, PlainConnector)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return snapshot_of(Kms.create(b"proxy"), APP_A)


@pytest.fixture
async def rig(snapshot: Snapshot) -> AsyncIterator[Rig]:
    one = Rig(snapshot)
    yield one
    one.worker.close()


TO_B = f"x-dstack-target-app: {APP_B}"

# To another app


async def test_a_target_header_leads_to_the_gateway(rig: Rig) -> None:
    route = rig.route(
        "POST /a/b?c=d HTTP/1.1", "Accept: */*", TO_B, "X-Own: 1", "Content-Length: 3"
    )
    name = f"{APP_B}-443s.apps.example"
    assert endpoint_of(route) == Endpoint(TcpAddress(name, 8443), name, APP_B)
    assert route.head == (
        b"POST /a/b?c=d HTTP/1.1\r\n"
        b"Host: x.example\r\nAccept: */*\r\nX-Own: 1\r\nContent-Length: 3\r\n\r\n"
    )


async def test_port_and_instance_make_the_name(rig: Rig) -> None:
    route = rig.route(
        "GET / HTTP/1.1",
        f"X-DStack-Target-App: {APP_B.upper()}",
        "X-DSTACK-TARGET-PORT: 8080",
        f"x-dstack-target-instance: {INSTANCE}",
    )
    name = f"{INSTANCE}-8080s.apps.example"
    assert endpoint_of(route) == Endpoint(TcpAddress(name, 8443), name, APP_B)
    assert b"target" not in route.head.lower()


async def test_a_fixed_gateway(rig: Rig) -> None:
    rig.directory.current = FixedGateway(TcpAddress("127.0.0.1", 9443))
    route = rig.route("GET / HTTP/1.1", TO_B)
    assert endpoint_of(route) == Endpoint(TcpAddress("127.0.0.1", 9443), None, APP_B)


async def test_another_address_for_the_gateway(rig: Rig) -> None:
    rig.make(gateway_connect=TcpAddress("10.0.0.1", 1443))
    endpoint = endpoint_of(rig.route("GET / HTTP/1.1", TO_B))
    assert endpoint.connect == TcpAddress("10.0.0.1", 1443)
    assert endpoint.server_name == f"{APP_B}-443s.apps.example"


async def test_one_target_has_one_lane(rig: Rig) -> None:
    first = rig.route("GET /1 HTTP/1.1", TO_B)
    assert rig.route("GET /2 HTTP/1.1", TO_B).lane is first.lane
    assert rig.route("GET /3 HTTP/1.1", "a: b", TO_B.upper()).lane is first.lane
    others = [
        rig.route("GET / HTTP/1.1", f"x-dstack-target-app: {OTHER}"),
        rig.route("GET / HTTP/1.1", TO_B, "x-dstack-target-port: 8080"),
        rig.route("GET / HTTP/1.1", TO_B, f"x-dstack-target-instance: {INSTANCE}"),
    ]
    assert len({id(one.lane) for one in (first, *others)}) == 4


async def test_one_address_for_two_apps_is_two_lanes(rig: Rig) -> None:
    rig.directory.current = FixedGateway(TcpAddress("127.0.0.1", 9443))
    first = rig.route("GET / HTTP/1.1", TO_B)
    other = rig.route("GET / HTTP/1.1", f"x-dstack-target-app: {OTHER}")
    assert first.lane is not other.lane
    assert (endpoint_of(first).app_id, endpoint_of(other).app_id) == (APP_B, OTHER)


async def test_a_gateway_that_moved_is_followed(rig: Rig) -> None:
    first = rig.route("GET / HTTP/1.1", TO_B)
    rig.directory.current = GatewayDomain("moved.example")
    second = rig.route("GET / HTTP/1.1", TO_B)
    assert second.lane is not first.lane
    assert endpoint_of(second).connect == TcpAddress(f"{APP_B}-443s.moved.example", 443)
    rig.directory.current = DOMAIN
    assert rig.route("GET / HTTP/1.1", TO_B).lane is first.lane


@pytest.mark.parametrize(
    "fields",
    [
        ["x-dstack-target-app: abc"],
        ["x-dstack-target-app:"],
        [TO_B, f"x-dstack-target-app: {OTHER}"],
        [TO_B, "x-dstack-target-port: 0"],
        [TO_B, "x-dstack-target-port: 080"],
        [TO_B, "x-dstack-target-port: 65536"],
        [TO_B, "x-dstack-target-instance: abc"],
        ["x-dstack-target-port: 80"],
        [f"x-dstack-target-instance: {INSTANCE}"],
    ],
)
async def test_a_target_that_cannot_be_read_goes_nowhere(rig: Rig, fields: list[str]) -> None:
    for _ in range(2):  # the second time the field block is known
        rig.fails(BadTarget, "GET /health HTTP/1.1", *fields)


async def test_a_repeated_header_that_says_the_same(rig: Rig) -> None:
    route = rig.route("GET / HTTP/1.1", TO_B, f"x-dstack-target-app: {APP_B.upper()}")
    assert endpoint_of(route).app_id == APP_B


async def test_no_identity(rig: Rig) -> None:
    rig.route("GET / HTTP/1.1", TO_B)
    rig.identity.current = None
    rig.fails(IdentityUnavailable, "GET / HTTP/1.1", TO_B)
    assert goes_to_agent(rig.ask("POST /info HTTP/1.1")), "the agent needs none"


async def test_no_gateway(rig: Rig) -> None:
    rig.route("GET / HTTP/1.1", TO_B)
    rig.directory.current = None
    rig.fails(GatewayUnknown, "GET / HTTP/1.1", TO_B)
    assert goes_to_agent(rig.ask("POST /info HTTP/1.1"))


async def test_the_meshs_own_paths_are_the_targets_where_one_is_named(rig: Rig) -> None:
    for path in ("/health", "/gateway"):
        endpoint_of(rig.route(f"GET {path} HTTP/1.1", TO_B))


@pytest.mark.parametrize(
    ("line", "host", "expected"),
    [
        # RFC 9112 3.2: HTTP/1.0 may come without a Host
        ("GET / HTTP/1.0", "", f"{APP_B}-443s"),
        ("GET / HTTP/1.0", "Host: x.example", "x.example"),
        ("GET http://y.example:81/ HTTP/1.1", "Host: x.example", "y.example:81"),
        ("GET http://y.example/ HTTP/1.0", "", "y.example"),
        ("GET / HTTP/1.1", "Host:", ""),
    ],
)
async def test_there_is_one_host(rig: Rig, line: str, host: str, expected: str) -> None:
    head = rig.route(line, TO_B, host=host).head
    hosts = [one for one in head.split(b"\r\n") if one.lower().startswith(b"host:")]
    assert [one[5:].strip().decode() for one in hosts] == [expected]
    assert head.startswith(b"GET / HTTP/1.1\r\n")


async def test_hop_by_hop_fields_end_here(rig: Rig) -> None:
    head = rig.route(
        "GET / HTTP/1.1", TO_B, "Connection: keep-alive, X-Hop", "X-Hop: 1", "X-Own: 2"
    ).head
    assert head == b"GET / HTTP/1.1\r\nHost: x.example\r\nX-Own: 2\r\n\r\n"


async def test_a_head_that_is_no_http(rig: Rig) -> None:
    for _ in range(2):
        rig.fails(BadRequest, "GET / HTTP/1.1", TO_B, "Host: y.example")


async def test_target_headers_are_no_trailers_and_errors_of_targets_are_marked(rig: Rig) -> None:
    route = rig.route("GET / HTTP/1.1", TO_B)
    assert {b"x-dstack-target-app", b"x-dstack-target-port", b"x-dstack-target-instance"} <= set(
        route.remove_trailers
    )
    error = (
        b"HTTP/1.1 403 Forbidden\r\nx-dstack-mesh-error: policy_denied\r\ncontent-length: 0\r\n\r\n"
    )
    marked = b"x-dstack-mesh-error: policy_denied; remote\r\n"
    assert marked in route.rules.head(error).fields.forwarded
    agent = rig.route("POST /info HTTP/1.1")
    assert b"mesh-error" not in agent.rules.head(error).fields.forwarded


# To the guest agent


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("/info", "/Info"),
        ("/get_quote", "/GetQuote"),
        ("/GetQuote?a=b_c/d_e", "/GetQuote?a=b_c/d_e"),
        ("/prpc/get-quote?", "/prpc/GetQuote?"),
        ("/health_check", "/HealthCheck"),
    ],
)
async def test_without_a_target_the_agent_is_asked(rig: Rig, target: str, call: str) -> None:
    route = rig.route(f"POST {target} HTTP/1.1", "Content-Length: 2")
    assert goes_to_agent(route)
    assert route.head == (
        f"POST {call} HTTP/1.1\r\nHost: x.example\r\nContent-Length: 2\r\n\r\n".encode()
    )
    assert route.lane is rig.route("GET /other HTTP/1.1").lane


async def test_an_agent_that_is_not_there_is_named_so(rig: Rig) -> None:
    connector = rig.route("POST /info HTTP/1.1").lane.connector
    error = connector.lost(None)
    assert type(error) is AgentUnavailable
    assert str(AGENT) in error.detail


@pytest.mark.parametrize(
    ("agent", "host"),
    [(AGENT, b"localhost"), (TcpAddress("127.0.0.1", 8090), b"127.0.0.1:8090")],
)
async def test_the_agents_host_for_a_request_without_one(
    rig: Rig, agent: Address, host: bytes
) -> None:
    rig.make(agent=agent)
    route = rig.route("GET /info HTTP/1.0", host="")
    assert route.head == b"GET /Info HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"


async def test_lookalikes_of_target_headers_are_taken_out_and_route_nothing(rig: Rig) -> None:
    route = rig.route("GET /info HTTP/1.1", f"x_dstack_target_app: {APP_B}", "X-Own: 1")
    assert goes_to_agent(route)
    assert route.head == b"GET /Info HTTP/1.1\r\nHost: x.example\r\nX-Own: 1\r\n\r\n"
    route = rig.route("GET /info HTTP/1.1", f"x_dstack_target_app: {OTHER}", TO_B)
    assert endpoint_of(route).app_id == APP_B
    assert b"target" not in route.head


@pytest.mark.parametrize(
    ("expose", "path", "let"),
    [
        ("all", "/get_quote", True),
        ("info", "/info", True),
        ("info", "/Version", True),
        ("info", "/get_quote", False),
        ("info", "/prpc/GetTlsKey", False),
        ("none", "/info", False),
        ("none", "/get_quote", False),
    ],
)
async def test_what_of_the_agent_is_offered(rig: Rig, expose: str, path: str, let: bool) -> None:
    rig.make(expose)
    if let:
        assert goes_to_agent(rig.ask(f"POST {path} HTTP/1.1"))
        return
    detail = rig.fails(AgentDenied, f"POST {path} HTTP/1.1")
    assert f"MESH_AGENT_EXPOSE is {expose}" in detail
    assert "x-dstack-target-app" in detail
    assert endpoint_of(rig.route(f"POST {path} HTTP/1.1", TO_B))


# The mesh's own


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/health", "/health?x=1"])
async def test_health(rig: Rig, method: str, path: str) -> None:
    rig.identity.current = rig.directory.current = None
    rig.make("none")
    answer = rig.ask(f"{method} {path} HTTP/1.1")
    assert isinstance(answer, Answer)
    assert answer.status == 200


async def test_only_reading_health_is_the_meshs_own(rig: Rig) -> None:
    assert goes_to_agent(rig.ask("POST /health HTTP/1.1"))
    assert goes_to_agent(rig.ask("GET /health/x HTTP/1.1"))


async def test_gateway_is_answered_as_it_is_in_effect(rig: Rig) -> None:
    rig.directory.current = GatewayDomain("apps.example", 443, "Apps.Example.:443")
    answer = rig.ask("GET /gateway HTTP/1.1")
    assert isinstance(answer, Answer)
    assert json.loads(answer.body) == {"gateway_domain": "Apps.Example.:443"}
    rig.directory.current = None
    rig.fails(GatewayUnknown, "GET /gateway HTTP/1.1")


async def test_every_connection_may_persist(rig: Rig) -> None:
    rig.proxy.connected(asyncio.Transport())
    assert rig.proxy.may_persist()

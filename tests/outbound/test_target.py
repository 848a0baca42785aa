from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dstack_mesh.errors import BadTarget
from dstack_mesh.gateway_domain import FixedGateway, GatewayDomain
from dstack_mesh.model import AppId, InstanceId, Target, TcpAddress
from dstack_mesh.outbound.target import Endpoint, endpoint, parse_target

APP = b"0123456789abcdefABCDEF0123456789abcdef01"
APP_ID = AppId(APP.decode().lower())
INSTANCE = b"B" * 40
GATEWAY = GatewayDomain("apps.example.org", 9443)


def test_no_header_is_no_target() -> None:
    assert parse_target([], [], [], 443) is None


def test_an_app_alone_takes_the_default_port() -> None:
    assert parse_target([APP], [], [], 8443) == Target(APP_ID, 8443)


def test_port_and_instance() -> None:
    target = parse_target([APP], [b"65535"], [INSTANCE], 443)
    assert target == Target(APP_ID, 65535, InstanceId("b" * 40))


def test_the_same_value_twice_is_that_value() -> None:
    twice = parse_target([APP, APP.lower()], [b"1", b"1"], [INSTANCE, b"b" * 40], 443)
    assert twice == Target(APP_ID, 1, InstanceId("b" * 40))


@pytest.mark.parametrize(
    ("apps", "ports", "instances", "says"),
    [
        ([], [b"443"], [], "x-dstack-target-port is there without x-dstack-target-app"),
        ([], [], [INSTANCE], "x-dstack-target-instance is there without x-dstack-target-app"),
        ([], [b""], [], "without x-dstack-target-app"),
        ([b""], [], [], "x-dstack-target-app is '', not an app-id"),
        ([APP[1:]], [], [], "not an app-id: 40 hex digits"),
        ([APP + b"0"], [], [], "not an app-id"),
        ([b"0x" + APP[2:]], [], [], "not an app-id"),
        ([APP + b"\n"], [], [], "not an app-id"),
        ([b"g" * 40], [], [], "not an app-id"),
        ([APP + b", " + APP], [], [], "not an app-id"),
        ([b"\xff" * 40], [], [], "not an app-id"),
        ([b"x" * 5000], [], [], r"is 'x{77}\.\.\.', not an app-id"),
        ([APP, b"junk"], [], [], "is 'junk', not an app-id"),
        ([APP, INSTANCE], [], [], "x-dstack-target-app is there twice with different values"),
        ([APP], [b"1", b"2"], [], "x-dstack-target-port is there twice with different values"),
        ([APP], [], [INSTANCE, APP], "x-dstack-target-instance is there twice"),
        ([APP], [], [b"b" * 39], "x-dstack-target-instance is '" + "b" * 39 + "', not an instance"),
        *(
            ([APP], [port], [], "not a port: 1 to 65535")
            for port in (
                b"",
                b"0",
                b"0443",
                b"00",
                b"+443",
                b"-1",
                b"65536",
                b"99999",
                b"100000",
                b"4 43",
                b"443 ",
                b"443\n",
                b"4_43",
                b"0x1",
                b"1e3",
                b"443.0",
                "٤٤٣".encode(),
                "²".encode("latin-1"),
            )
        ),
        ([APP], [b"443", b"0443"], [], "not a port"),
    ],
)
def test_what_cannot_be_read_is_refused(
    apps: list[bytes], ports: list[bytes], instances: list[bytes], says: str
) -> None:
    with pytest.raises(BadTarget, match=says) as refused:
        parse_target(apps, ports, instances, 443)
    assert refused.value.detail.isascii()
    assert refused.value.detail.isprintable()


def test_the_host_names_app_and_port() -> None:
    made = endpoint(Target(APP_ID, 8443), GATEWAY, None)
    host = f"{APP_ID}-8443s.apps.example.org"
    assert made == Endpoint(TcpAddress(host, 9443), host, APP_ID)


def test_an_instance_is_asked_and_the_app_stays_who_must_answer() -> None:
    made = endpoint(Target(APP_ID, 443, InstanceId("b" * 40)), GATEWAY, None)
    assert made.server_name == f"{'b' * 40}-443s.apps.example.org"
    assert made.app_id == APP_ID


def test_the_override_moves_the_connection_and_not_the_name() -> None:
    override = TcpAddress("10.0.0.1", 8000)
    made = endpoint(Target(APP_ID, 443), GATEWAY, override)
    assert made == Endpoint(override, f"{APP_ID}-443s.apps.example.org", APP_ID)
    fixed = endpoint(Target(APP_ID, 443), FixedGateway(TcpAddress("mesh-b", 1)), override)
    assert fixed == Endpoint(override, "mesh-b", APP_ID)


@pytest.mark.parametrize(
    ("host", "name"), [("127.0.0.1", None), ("::1", None), ("mesh-b", "mesh-b")]
)
def test_a_fixed_gateway_serves_every_target(host: str, name: str | None) -> None:
    address = TcpAddress(host, 8443)
    made = endpoint(Target(APP_ID, 443), FixedGateway(address), None)
    assert made == Endpoint(address, name, APP_ID)


def test_a_host_name_over_253_characters_is_refused() -> None:
    gateway = GatewayDomain("a." * 104 + "a")
    assert len(gateway.base_domain) == 209
    assert endpoint(Target(APP_ID, 1), gateway, None).server_name is not None
    with pytest.raises(BadTarget, match=r"not a valid host name \(254 characters\)"):
        endpoint(Target(APP_ID, 10), gateway, None)


@pytest.mark.parametrize("domain", ["", "a b.example", "a..example", "10.0.0.1", "ä.example"])
def test_a_domain_that_is_none_gives_no_host(domain: str) -> None:
    with pytest.raises(BadTarget, match="not a valid host name") as refused:
        endpoint(Target(APP_ID, 443), GatewayDomain(domain), None)
    assert refused.value.detail.isascii()


HEX = st.text("0123456789abcdefABCDEF", min_size=40, max_size=40).map(str.encode)
VALUES = st.lists(
    st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")) | HEX,
    max_size=3,
)
PORTS = st.lists(
    st.binary(max_size=6) | st.integers(0, 70_000).map(lambda n: b"%d" % n), max_size=3
)


@given(VALUES | HEX.map(lambda app: [app]), PORTS, VALUES)
@example([APP + b"."], [], [])
@example([APP], [b"443s.evil.example"], [])
@example([APP], [], [b"evil.example/" + APP])
def test_any_values_are_refused_or_lead_into_the_gateways_domain(
    apps: list[bytes], ports: list[bytes], instances: list[bytes]
) -> None:
    try:
        target = parse_target(apps, ports, instances, 443)
    except BadTarget as refused:
        detail = refused.detail
        target = None
    else:
        detail = ""
    assert detail.isascii()
    assert not detail or detail.isprintable()
    if target is None:
        assert bool(detail) == bool([*apps, *ports, *instances])
        return
    assert apps[0].lower() == target.app_id.encode()
    made = endpoint(target, GATEWAY, None)
    assert made.server_name == made.connect.host
    assert re.fullmatch(r"[0-9a-f]{40}-[1-9][0-9]{0,4}s\.apps\.example\.org", made.connect.host)
    assert (made.connect.port, made.app_id) == (9443, target.app_id)
    asked = (instances or apps)[0].decode().lower()
    port = int(ports[0]) if ports else 443
    assert made.server_name == f"{asked}-{port}s.apps.example.org"

"""The three target headers make hosts of the gateway's domain, or nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.memory_mesh import TARGET, OutboundMesh
from tests.properties.messages import damages, splits

from dstack_mesh.errors import BadTarget
from dstack_mesh.gateway_domain import (
    MAX_HOST,
    FixedGateway,
    GatewayDomain,
    normalise_base_domain,
    parse_gateway,
    valid_host,
)
from dstack_mesh.model import AppId, InstanceId, Target
from dstack_mesh.outbound.target import endpoint, parse_target

APP = TARGET.encode()
HEX = st.text("0123456789abcdefABCDEF", min_size=40, max_size=40).map(str.encode)
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True) | st.just("a" * 63)


def _is_domain(text: str) -> bool:
    try:
        return normalise_base_domain(text) == text
    except ValueError:
        return False


DOMAINS = st.lists(LABELS, min_size=1, max_size=30).map(".".join).filter(_is_domain)
PORTS = st.integers(1, 65_535)
IDS = HEX.map(lambda value: value.decode().lower())


@given(IDS, PORTS, st.none() | IDS, DOMAINS, PORTS)
@example("0" * 40, 65_535, None, "a." * 102 + "a", 443)
@example("0" * 40, 10, None, "a." * 104 + "a", 443)
def test_every_valid_target_is_a_host_of_any_valid_domain(
    app: str, port: int, instance: str | None, domain: str, gateway_port: int
) -> None:
    target = Target(AppId(app), port, InstanceId(instance) if instance else None)
    host = f"{instance or app}-{port}s.{domain}"
    gateway = GatewayDomain(domain, gateway_port)
    if len(host) > MAX_HOST:
        with pytest.raises(BadTarget):
            endpoint(target, gateway, None)
        return
    made = endpoint(target, gateway, None)
    assert (made.connect.host, made.connect.port) == (host, gateway_port)
    assert (made.server_name, made.app_id) == (host, app)
    assert valid_host(host)


@given(st.text(max_size=60) | st.builds("{}{}{}".format, st.text(max_size=3), DOMAINS, st.text()))
@example("a.example/../evil.example")
@example("a.example#")
@example("a.example:443@evil.example")
@example("K.example")  # the Kelvin sign, whose lower case is an ASCII letter
def test_any_text_of_a_setting_gives_a_gateway_with_valid_hosts_or_none(text: str) -> None:
    try:
        gateway = parse_gateway(text)
    except ValueError:
        return
    if isinstance(gateway, FixedGateway):
        return
    made = endpoint(Target(AppId("0" * 40), 1), gateway, None)
    assert made.server_name == f"{'0' * 40}-1s.{gateway.base_domain}"
    assert valid_host(made.server_name)
    assert gateway.base_domain.isascii()


ODD = st.sampled_from([b"\n", b"\r\n", b" ", b"0", b".", b".evil.example", b"/", b"-1s.", b"0x"])
MIXED = (
    st.binary(max_size=45)
    | st.text(max_size=45).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | HEX
    | st.builds(bytes.__add__, HEX, ODD)
    | st.builds(bytes.__add__, ODD, HEX)
    | st.from_regex(rb"[0-9]{1,6}", fullmatch=True)
    | (HEX | PORTS.map(lambda port: b"%d" % port)).flatmap(damages)
    | PORTS.map(lambda port: b"%d" % port)
)


VALUES = st.lists(MIXED, max_size=2)


@settings(max_examples=5 * settings().max_examples)  # nothing here takes time
@given(st.just([APP]) | st.just([APP, APP.upper()]) | VALUES, VALUES, st.just([]) | VALUES)
@example([APP], [b"0443"], [])
@example([APP + b"\n"], [], [])
def test_any_values_with_any_default_port(
    apps: list[bytes], ports: list[bytes], instances: list[bytes]
) -> None:
    """Every accepted value is one that the contract allows, taken as it is."""
    try:
        target = parse_target(apps, ports, instances, 7)
    except BadTarget:
        return
    if target is None:
        assert not [*apps, *ports, *instances]
        return
    assert {app.decode().lower() for app in apps} == {target.app_id}
    assert re.fullmatch("[0-9a-f]{40}", target.app_id)
    assert {one.decode().lower() for one in instances} == (
        {target.instance_id} if target.instance_id else set()
    )
    assert {port.decode() for port in ports} <= {str(target.port)}
    assert 1 <= target.port <= 65_535


@st.composite
def addressed(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    """A request with target headers of any bytes, in pieces; and whether all lines are well-formed.

    A value with a line end makes fields, or messages, of its own: that is the client's to say.
    """
    lines = []
    for name in (b"x-dstack-target-app", b"x-dstack-target-port", b"x-dstack-target-instance"):
        for value in draw(st.lists(MIXED | st.just(APP) | st.just(b"443"), max_size=2)):
            spelled = draw(st.sampled_from([name, name.upper(), name.title()]))
            lines.append(spelled + draw(st.sampled_from([b":", b": ", b":\t "])) + value)
    block = b"\r\n".join([b"GET / HTTP/1.1", b"Host: h", *lines])
    plain = not re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", b"".join(lines))
    return draw(splits(block + b"\r\n\r\n")), plain and bool(lines)


@given(addressed(), DOMAINS)
@example(([b"GET / HTTP/1.1\r\nHost: h\r\nX-Dstack-Target-App: " + APP + b"\r\n\r\n"], True), "a.b")
def test_a_whole_proxy_connects_to_hosts_of_the_gateways_domain_only(
    request: tuple[list[bytes], bool], domain: str
) -> None:
    pieces, plain = request
    with OutboundMesh(gateway=GatewayDomain(domain, 9443)) as mesh:
        mesh.client_sends(*pieces)
        attempts = mesh.handshaking
        for attempt in attempts:
            assert attempt.server_name.endswith(f"s.{domain}")
            own = attempt.server_name.removesuffix(f"s.{domain}")
            assert re.fullmatch(r"[0-9a-f]{40}-[1-9][0-9]{0,4}", own)
            assert attempt.address == (attempt.server_name, 9443)
        if plain:
            assert mesh.agents == []
            assert len(attempts) == 1 or mesh.codes == ["bad_target"]

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.gateway_domain import (
    MAX_HOST,
    FixedGateway,
    GatewayDomain,
    is_address,
    normalise_base_domain,
    parse_gateway,
    valid_host,
)
from dstack_mesh.model import TcpAddress


@pytest.mark.parametrize(
    ("text", "domain", "port"),
    [
        ("apps.example.org", "apps.example.org", 443),
        ("apps.example.org:443", "apps.example.org", 443),
        ("apps.example.org:9443", "apps.example.org", 9443),
        ("Apps.Example.ORG.:65535", "apps.example.org", 65535),
        (" apps.example.org/ ", "apps.example.org", 443),
        ("localhost", "localhost", 443),
        ("a-b.x1", "a-b.x1", 443),
        ("1.2.3.example", "1.2.3.example", 443),
    ],
)
def test_a_base_domain(text: str, domain: str, port: int) -> None:
    gateway = parse_gateway(text)
    assert gateway == GatewayDomain(domain, port)
    assert gateway.text == text.strip().rstrip("/")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("fixed/127.0.0.1:8443", TcpAddress("127.0.0.1", 8443)),
        ("fixed/[::1]:8443", TcpAddress("::1", 8443)),
        ("fixed/[::1]", TcpAddress("::1", 443)),
        ("fixed/Mesh_A.local.:1", TcpAddress("mesh_a.local", 1)),
        ("fixed/localhost", TcpAddress("localhost", 443)),
        ("fixed/localhost:1/", TcpAddress("localhost", 1)),
    ],
)
def test_a_fixed_address(text: str, address: TcpAddress) -> None:
    gateway = parse_gateway(text)
    assert gateway == FixedGateway(address)
    assert gateway.text == text.rstrip("/")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a domain name"),
        ("https://apps.example.org", "is a URL"),
        ("apps..example", "not a domain name"),
        ("-a.example", "not a domain name"),
        ("a-.example", "not a domain name"),
        ("a_b.example", "not a domain name"),
        ("127.0.0.1", "not a domain name"),
        ("a.1", "not a domain name"),
        ("exämple.org", "not a domain name"),
        ("\N{KELVIN SIGN}.example", "not a domain name"),  # its lower case is k
        ("a b.example", "not a domain name"),
        ("a.example\n:1", "not a domain name"),
        ("a.example/x", "not a domain name"),
        ("x" * 64, "not a domain name"),
        ("a." * 128, "not a domain name"),
        ("a." * 104 + "aa", "too long for a base domain: 210 characters, and 209"),
        ("a.example:", "no valid port"),
        ("a.example:0", "no valid port"),
        ("a.example:65536", "no valid port"),
        ("a.example:0443", "no valid port"),
        ("a.example:+1", "no valid port"),
        ("a.example:٤", "no valid port"),
        ("a.example:1:2", "no valid port"),
        ("::1", "no valid port"),
        ("fixed/", "no valid host"),
        ("fixed/:80", "no valid host"),
        ("fixed/10.1:80", "no valid host"),
        ("fixed/a b:80", "no valid host"),
        ("fixed/::1:80", "no valid port"),
        ("fixed/[::1:80", "IPv6"),
        ("fixed/[a]:80", "IPv6"),
        ("fixed/[127.0.0.1]:80", "IPv6"),
        ("fixed/[:x:]:80", "IPv6"),
        ("fixed/[::1]80", "IPv6"),
        ("fixed/[::1%lo]:80", "IPv6"),
        ("fixed/[::1]:x", "no valid port"),
        ("fixed/\N{KELVIN SIGN}.local:80", "no valid host"),
    ],
)
def test_what_is_neither_is_refused_with_its_value(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        parse_gateway(text)
    assert ascii(text)[1:8] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(ValueError, match=r"x{77}\.\.\.' is not") as refused:
        parse_gateway("x" * 10_000)
    assert len(str(refused.value)) < 300


def test_the_text_does_not_make_another_gateway() -> None:
    assert GatewayDomain("a.example", 443, "a.example:443") == GatewayDomain("a.example")
    assert hash(GatewayDomain("a.example", 443, "a.example:443")) == hash(
        GatewayDomain("a.example")
    )
    assert GatewayDomain("a.example", 444).text == "a.example:444"
    assert FixedGateway(TcpAddress("::1", 9)).text == "fixed/[::1]:9"


@given(st.text() | st.text("aB1-_.:/[]0", max_size=60) | st.from_regex(r"fixed/.*"))
def test_any_text_is_a_usable_gateway_or_a_value_error(text: str) -> None:
    try:
        gateway = parse_gateway(text)
    except ValueError:
        return
    assert parse_gateway(gateway.text) == gateway
    if isinstance(gateway, GatewayDomain):
        assert valid_host(gateway.base_domain)
        assert len(f"{'0' * 40}-1s.{gateway.base_domain}") <= MAX_HOST
        assert normalise_base_domain(gateway.base_domain) == gateway.base_domain
        assert not is_address(gateway.base_domain)
    else:
        assert 1 <= gateway.address.port <= 65535
        assert gateway.address.host

"""The gateway's domain as settings and discovery read it: what is accepted reads back to itself."""

from __future__ import annotations

import ipaddress
import re

from dstack_mesh import gateway_domain as rules

_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")

SEEDS = (
    b"g.example",
    b"G.Example.:8443/",
    b" fixed/127.0.0.1:80 ",
    b"fixed/[fe80::1]:1",
    b"fixed/[::1",
    b"fixed/a_b:65535/",
    b"https://g.example",
    b"10.1",
    b"g.example:0",
    b"g.example:65536",
    b"-a.b",
    b"a." * 105 + b"a",
    "fixed/\u212a.example".encode(),
    b"fixed/[fe80::1%eth0]:1",
)


def run(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        gateway = rules.parse_gateway(text)
    except ValueError as error:
        assert type(error) is ValueError, f"{error!r} is not for the setting's reader"
        assert str(error).isprintable(), str(error)
        return
    assert rules.parse_gateway(gateway.text) == gateway
    assert gateway.text.isascii()
    if isinstance(gateway, rules.FixedGateway):
        host, port = gateway.address.host, gateway.address.port
        assert rules.parse_gateway(rules.FixedGateway(gateway.address).text) == gateway
        assert _is_address(host) or _HOST.fullmatch(host), host
    else:
        host, port = gateway.base_domain, gateway.port
        assert rules.parse_gateway(rules.GatewayDomain(host, port).text) == gateway
        assert _HOST.fullmatch(host), host
        assert "_" not in host
        assert len(f"{'0' * 40}-1s.{host}") <= 253
        assert rules.normalise_base_domain(host) == host
        assert not _is_address(host)
    assert 1 <= port <= 65535
    assert host == host.lower() or _is_address(host)
    assert host.lower() in text.lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

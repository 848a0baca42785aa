"""Target headers: whatever they say, they make a host of the gateway's domain or an error."""

from __future__ import annotations

import ipaddress
import re

from dstack_mesh.errors import BadTarget
from dstack_mesh.gateway_domain import FixedGateway, Gateway, GatewayDomain, parse_gateway
from dstack_mesh.model import Target
from dstack_mesh.outbound import target as rules

_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*")
_ID = re.compile(rb"\A[0-9a-fA-F]{40}\Z")
_DEFAULT_PORT = 443
_A = b"aA" * 20

# A line for the gateway's domain (`!`: not as settings read it), then one for each header value.
SEEDS = (
    b"g.example\na" + _A,
    b"g.example:8443\na" + _A + b"\np8080\ni" + b"1b" * 20,
    b"fixed/127.0.0.1:9\na" + _A,
    b"fixed/[::1]:9\na" + _A + b"\na" + _A.lower(),
    b"fixed/host_name\na" + _A + b"\np65535",
    b"!G..example\na" + _A,
    b"!" + b"a." * 120 + b"a\na" + _A + b"\np65535",
    b"g.example\np1",
    b"g.example\ni" + _A,
    b"g.example\na" + _A + b"\np080",
    b"g.example\na" + _A + b"\np65536\np1",
    b"g.example\na" + _A[:-1],
    b"g.example\na" + _A + b"\na" + b"bb" * 20,
    b"g.example",
)


def run(data: bytes) -> None:
    domain, *lines = data.split(b"\n")
    values: dict[bytes, list[bytes]] = {b"a": [], b"p": [], b"i": []}
    for line in lines:
        values.get(line[:1], []).append(line[1:])
    try:
        found = rules.parse_target(values[b"a"], values[b"p"], values[b"i"], _DEFAULT_PORT)
    except BadTarget as error:
        assert error.detail.isprintable()
        assert not _good(values), error.detail
        return
    assert (found is None) == (not any(values.values()))
    gateway = _gateway(domain.decode("latin-1"))
    if found is None or gateway is None:
        return
    _check_target(found, values)
    try:
        where = rules.endpoint(found, gateway, None)
    except BadTarget as error:
        assert error.detail.isprintable()
        assert isinstance(gateway, GatewayDomain)
        assert domain.startswith(b"!") or len(gateway.base_domain) > 200
        return
    assert where.app_id == found.app_id
    if isinstance(gateway, FixedGateway):
        assert where.connect == gateway.address
        assert where.server_name in (None, gateway.address.host)
        return
    _check_host(where, found, gateway)


def _gateway(text: str) -> Gateway | None:
    if text.startswith("!"):
        return GatewayDomain(text[1:])
    try:
        return parse_gateway(text)
    except ValueError:
        return None


def _good(values: dict[bytes, list[bytes]]) -> bool:
    ids = all(_ID.match(value) for value in values[b"a"] + values[b"i"])
    ports = all(p.isdigit() and p == b"%d" % int(p[:9]) for p in values[b"p"])
    one_each = all(len({value.lower() for value in several}) <= 1 for several in values.values())
    in_range = all(0 < int(p[:9]) < 65536 for p in values[b"p"]) if ports else False
    return bool(values[b"a"]) and ids and in_range and one_each


def _check_target(found: Target, values: dict[bytes, list[bytes]]) -> None:
    assert _good(values), f"{values} was taken for a target"
    assert {value.lower() for value in values[b"a"]} == {found.app_id.encode()}
    assert {int(p) for p in values[b"p"]} in (set(), {found.port})
    assert values[b"p"] or found.port == _DEFAULT_PORT
    said = {value.lower().decode() for value in values[b"i"]}
    assert said == ({found.instance_id} if found.instance_id else set())


def _check_host(where: rules.Endpoint, found: Target, gateway: GatewayDomain) -> None:
    host = where.server_name
    assert host is not None
    assert host == where.connect.host
    assert where.connect.port == gateway.port
    assert len(host) <= 253
    assert _HOST.fullmatch(host), host
    own, _, domain = host.partition(".")
    assert domain == gateway.base_domain, "a host of another domain"
    assert own == f"{found.instance_id or found.app_id}-{found.port}s"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return
    raise AssertionError(f"{host} is an address")

"""From a request's target headers to the connection that serves it. Pure.

The headers and the host name are interface.md's, Outbound. What can't be read is refused with
`bad_target`, never taken for absent: a request meant for another CVM must not end elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dstack_mesh.errors import BadTarget
from dstack_mesh.gateway_domain import MAX_HOST, FixedGateway, Gateway, is_address, valid_host
from dstack_mesh.model import AppId, InstanceId, Target, TcpAddress

if TYPE_CHECKING:
    from collections.abc import Sequence

APP_HEADER = "x-dstack-target-app"
PORT_HEADER = "x-dstack-target-port"
INSTANCE_HEADER = "x-dstack-target-instance"

_ID = re.compile(rb"[0-9A-Fa-f]{40}")
_PORT = re.compile(rb"[1-9][0-9]{0,4}")
_MAX_PORT = 65535
_MAX_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A connection's other end; hashable, and with our identity's generation the pool's key."""

    connect: TcpAddress
    """Where to open the TCP connection."""

    server_name: str | None
    """What TLS names in SNI (RFC 6066 3: never an address); the identity rests on `app_id`."""

    app_id: AppId
    """Who must answer there."""


def parse_target(
    apps: Sequence[bytes], ports: Sequence[bytes], instances: Sequence[bytes], default_port: int
) -> Target | None:
    """Read the values of the three target headers, each as often as it appeared, OWS stripped.

    None where none of them is there: the request is no mesh request. Raises `BadTarget` for a
    malformed value, different values of one header, and a port or an instance without an app.
    """
    if not apps:
        if not ports and not instances:
            return None
        lone = PORT_HEADER if ports else INSTANCE_HEADER
        raise BadTarget(f"{lone} is there without {APP_HEADER}, which names the app to ask")
    app_id = AppId(_one_id(APP_HEADER, apps, "an app-id"))
    port = _one_port(ports) if ports else default_port
    if not instances:
        return Target(app_id, port)
    return Target(app_id, port, InstanceId(_one_id(INSTANCE_HEADER, instances, "an instance-id")))


def endpoint(target: Target, gateway: Gateway, connect_override: TcpAddress | None) -> Endpoint:
    """Give the connection that serves `target`; `connect_override` is `MESH_GATEWAY_CONNECT`.

    Raises `BadTarget` where `{id}-{port}s.{base domain}` is no valid host name.
    """
    if isinstance(gateway, FixedGateway):
        address = gateway.address
        name = None if is_address(address.host) else address.host
        return Endpoint(connect_override or address, name, target.app_id)
    host = f"{target.instance_id or target.app_id}-{target.port}s.{gateway.base_domain}"
    if len(host) > MAX_HOST or not _valid_base(gateway.base_domain):
        raise BadTarget(
            f"{_shown(host.encode())} is not a valid host name ({len(host)} characters); the"
            f" gateway's domain is {_shown(gateway.base_domain.encode())}"
        )
    return Endpoint(connect_override or TcpAddress(host, gateway.port), host, target.app_id)


# Once per domain: the part before it is of letters, digits and a hyphen, and at most 48 long.
_valid_base = lru_cache(maxsize=16)(valid_host)


def _one_id(header: str, values: Sequence[bytes], what: str) -> str:
    first = values[0]
    for value in values:
        if _ID.fullmatch(value) is None:
            raise BadTarget(f"{header} is {_shown(value)}, not {what}: 40 hex digits")
        if value.lower() != first.lower():
            raise _differ(header, first, value)
    return first.decode().lower()


def _one_port(values: Sequence[bytes]) -> int:
    first = values[0]
    for value in values:
        if _PORT.fullmatch(value) is None or int(value) > _MAX_PORT:
            raise BadTarget(
                f"{PORT_HEADER} is {_shown(value)}, not a port: 1 to {_MAX_PORT}, decimal digits"
                " without leading zeros"
            )
        if value != first:
            raise _differ(PORT_HEADER, first, value)
    return int(first)


def _differ(header: str, first: bytes, other: bytes) -> BadTarget:
    return BadTarget(
        f"{header} is there twice with different values: {_shown(first)} and then {_shown(other)}"
    )


def _shown(value: bytes) -> str:
    text = value if len(value) <= _MAX_SHOWN else value[: _MAX_SHOWN - 3] + b"..."
    return ascii(text.decode("latin-1"))

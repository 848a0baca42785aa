"""Where targets are reached: the gateway's domain, or one fixed address for development. Pure.

This is the value of `MESH_GATEWAY` (interface.md, Settings) and what discovery finds; settings,
the gateway's client and the target rules share it.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

from dstack_mesh.model import TcpAddress

DEFAULT_PORT = 443
"""The gateway's port where none is written: that of https (RFC 9110 4.2.2)."""

_FIXED = "fixed/"

# RFC 1123 2.1: letters, digits and hyphens, no hyphen at either end; RFC 1035 2.3.4: 63 octets.
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# A fixed host is a name of the user's own network, where container names have underscores.
_FIXED_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")

MAX_HOST = 253
"""Octets of a host name as text (RFC 1035 3.1: 255 on the wire)."""

_MAX_BASE = MAX_HOST - len(f"{'0' * 40}-1s.")
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class GatewayDomain:
    """Targets are `{id}-{port}s.{base_domain}` (lower case, no trailing dot), at `port`.

    `text` is the setting as written, or `base_domain[:port]` where nobody wrote it. It does not
    count in comparisons: the same domain written otherwise is the same gateway.
    """

    base_domain: str
    port: int = DEFAULT_PORT
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.text:
            port = "" if self.port == DEFAULT_PORT else f":{self.port}"
            object.__setattr__(self, "text", f"{self.base_domain}{port}")


@dataclass(frozen=True, slots=True)
class FixedGateway:
    """Every target is at one address: for development. `text` as in `GatewayDomain`."""

    address: TcpAddress
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.text:
            object.__setattr__(self, "text", f"{_FIXED}{self.address}")


Gateway = GatewayDomain | FixedGateway


def valid_host(host: str) -> bool:
    """Tell whether `host` (lower case, no trailing dot) is a host name of RFC 1123 2.1."""
    return _names(host, _LABEL)


def is_address(host: str) -> bool:
    """Tell whether `host` is an IPv4 or IPv6 address, without brackets and without a scope."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host


def normalise_base_domain(text: str) -> str:
    """Give `text` as a base domain: lower case, without a trailing dot.

    Raises ValueError where it is not a host name, or leaves no room for `{id}-{port}s.`.
    """
    domain = text.lower().removesuffix(".")
    if not text.isascii() or not valid_host(domain):
        raise ValueError(
            f"{_shown(text)} is not a domain name: letters, digits and hyphens in parts of at most"
            " 63, separated by dots, and not an address"
        )
    if len(domain) > _MAX_BASE:
        raise ValueError(
            f"{_shown(text)} is too long for a base domain: {len(domain)} characters, and"
            f" {_MAX_BASE} at most leave room for the target's own part of the name"
        )
    return domain


def parse_gateway(text: str) -> Gateway:
    """Read `base.domain[:port]` or `fixed/host[:port]`; the port is 443 where none is written.

    A slash at the end is allowed, since the setting was once glued into a URL. Raises ValueError,
    its message for the setting's reader.
    """
    setting = text.strip()
    if setting.startswith(_FIXED):
        fixed = setting.removeprefix(_FIXED).rstrip("/")
        return FixedGateway(_fixed_address(fixed, text), f"{_FIXED}{fixed}")
    setting = setting.rstrip("/")
    if "://" in setting:
        raise ValueError(f"{_shown(text)} is a URL: leave out the part up to ://")
    host, port = _split_port(setting, text)
    return GatewayDomain(normalise_base_domain(host), port, setting)


def _fixed_address(rest: str, text: str) -> TcpAddress:
    if rest.startswith("["):
        host, bracket, after = rest[1:].partition("]")
        if not bracket or ":" not in host or not is_address(host) or after[:1] not in ("", ":"):
            raise ValueError(
                f"{_shown(text)} is not an address: an IPv6 address is written [::1]:8443"
            )
        _, port = _split_port(f"h{after}", text)
        return TcpAddress(host, port)
    host, port = _split_port(rest, text)
    host = host.lower().removesuffix(".")
    # Some letters outside ASCII have a lower case inside it, so the text as written is asked.
    if not rest.isascii() or not (is_address(host) or _names(host, _FIXED_LABEL)):
        raise ValueError(
            f"{_shown(text)} names no valid host: fixed/host:port takes a host name, an IPv4"
            " address or an IPv6 address in brackets"
        )
    return TcpAddress(host, port)


def _split_port(rest: str, text: str) -> tuple[str, int]:
    host, colon, port = rest.partition(":")
    if not colon:
        return host, DEFAULT_PORT
    if _PORT.fullmatch(port) is None or int(port) > _MAX_PORT:
        raise ValueError(
            f"{_shown(text)} has no valid port: a number from 1 to {_MAX_PORT} after one colon,"
            " decimal digits without leading zeros"
        )
    return host, int(port)


def _names(host: str, label: re.Pattern[str]) -> bool:
    if len(host) > MAX_HOST:
        return False
    labels = host.split(".")
    # A resolver takes a name that ends in a number for an address, 10.1 for 10.0.0.1.
    return all(label.fullmatch(part) for part in labels) and not labels[-1].isdigit()


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")

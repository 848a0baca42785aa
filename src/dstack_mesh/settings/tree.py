"""The effective settings as one frozen tree: what every part reads, and nobody changes.

Durations are seconds. The tree is built by `settings.load`, key by key from `settings.schema`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dstack_mesh.gateway_domain import Gateway
    from dstack_mesh.model import Address, TcpAddress
    from dstack_mesh.policy.allow import Allow
    from dstack_mesh.policy.route import Route
    from dstack_mesh.policy.rule import Rule


@dataclass(frozen=True, slots=True)
class OutboundSettings:
    """The local application's side."""

    listen: Address | None
    """None: the listener is off."""

    default_port: int
    agent: Literal["all", "info", "none"]
    """What of the guest agent the listener offers."""

    connect_timeout: float
    response_timeout: float
    """0 is no limit."""


@dataclass(frozen=True, slots=True)
class InboundSettings:
    """The side on which other CVMs call. Without a backend the embedded terminator is off."""

    backend: Address | None
    mode: Literal["embedded", "nginx", "off"]
    listen: Address | None
    auth_listen: Address
    server_name: str
    """For the configuration of nginx; `_` stands for any name."""

    allow: Allow
    policy_mode: Literal["enforce", "audit"]
    rules: tuple[Rule, ...] = ()
    """The file's `[[inbound.rule]]`, in their order."""

    routes: tuple[Route, ...] = ()
    """The file's `[[inbound.route]]`, in their order."""


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """The listener for health, readiness and metrics."""

    listen: Address | None
    """None: the listener is off."""


@dataclass(frozen=True, slots=True)
class DstackSettings:
    """Where the CVM's guest agent and the gateway are."""

    gateway_domain: Gateway | None
    """None: discovered through the gateway's own info call."""

    agent: Address
    sys_config: str
    gateway_connect: TcpAddress | None
    """The address to connect to instead of resolving the server name."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The identity's source and TLS's bounds. The three files are there together or not at all."""

    cert_file: str | None
    key_file: str | None
    ca_file: str | None
    lifetime: float
    """Seconds of lifetime asked of the guest agent."""

    min_version: Literal["1.2", "1.3"]


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How and how much is logged."""

    format: Literal["json", "text"]
    level: Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one sidecar."""

    outbound: OutboundSettings
    inbound: InboundSettings
    admin: AdminSettings
    dstack: DstackSettings
    tls: TlsSettings
    log: LogSettings
    drain_timeout: float
    idle_timeout: float
    head_timeout: float
    max_connections: int

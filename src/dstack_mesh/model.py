"""Values that cross from one part of the mesh to another. They are frozen and do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

AppId = NewType("AppId", str)
"""An app-id as text: 40 lower-case hex digits (20 bytes)."""

InstanceId = NewType("InstanceId", str)
"""An instance-id as text: 40 lower-case hex digits (20 bytes)."""


class Role(Enum):
    """What a peer is in a connection; its certificate must be good for this (RFC 5280 4.2.1.12)."""

    TARGET = "target"
    """The TLS server that we call; an EKU, where present, names serverAuth."""

    CALLER = "caller"
    """The TLS client that calls us; an EKU, where present, names clientAuth."""


@dataclass(frozen=True, slots=True)
class AppInfo:
    """What the KMS wrote about the peer's CVM into its leaf; hashes and ids in lower-case hex."""

    app_id: AppId
    compose_hash: str
    instance_id: str
    device_id: str
    os_image_hash: str


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A peer whose chain kept every rule: who it is, and until when that holds."""

    app_id: AppId
    not_after: float
    """Seconds since 1970 at which the first certificate of the chain below the root expires."""

    app_info: AppInfo | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request is to go, as its headers said."""

    app_id: AppId
    port: int
    instance_id: InstanceId | None = None


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host name or IP address (without brackets) and a port from 0 to 65535."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a unix stream socket."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress

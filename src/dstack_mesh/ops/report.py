"""What a worker process tells of itself, as plain data that crosses a socket (msgspec).

Times are seconds since 1970, durations seconds. `/status` is a `Status` as JSON.
"""

from __future__ import annotations

import msgspec

from dstack_mesh.ops.families import Family


class Check(msgspec.Struct, frozen=True):
    """One check of readiness; the reason is for the reader in either case."""

    ok: bool
    reason: str


class Readiness(msgspec.Struct, frozen=True):
    """What `/readyz` answers, as JSON."""

    ready: bool
    checks: dict[str, Check]


class Identity(msgspec.Struct, frozen=True):
    """Who we are; the fields of a certificate are None while there is none."""

    source: str
    problem: str | None
    """Why the last attempt to get a certificate gave none."""
    fetched: int
    failed: int
    app_id: str | None = None
    generation: int = 0
    loaded_at: float | None = None
    renew_at: float | None = None
    not_after: float | None = None
    instance_id: str = ""
    compose_hash: str = ""
    os_image_hash: str = ""
    device_id: str = ""


class Gateway(msgspec.Struct, frozen=True):
    """Where other apps are reached."""

    domain: str | None
    is_configured: bool
    """Set by hand, and not discovered."""
    problem: str | None


class Traffic(msgspec.Struct, frozen=True):
    """The exchanges of one direction since the process began, and the connections open now."""

    requests: int
    errors: dict[str, int]
    """By the mesh's own code."""
    classes: dict[str, int]
    """By hundreds of the status (`2xx`); `none` for an exchange that ended before it had one."""
    bytes_up: int
    bytes_down: int
    buckets: list[int]
    """Exchanges by duration: up to each of `Status.bucket_bounds`, and the rest. Not summed up."""
    seconds: float
    downstream: int
    upstream_active: int
    upstream_idle: int


class PeerError(msgspec.Struct, frozen=True):
    """The last error of a peer's requests."""

    at: float
    code: str
    detail: str


class Peer(msgspec.Struct, frozen=True):
    """A target or a caller."""

    name: str
    """`{app-id}` of a caller, `{app-id}:{port}[/{instance-id}]` of a target; or `others`."""
    requests: int
    errors: int
    active: int
    """Connections with an exchange on them; of a caller all that are open."""
    idle: int
    last_error: PeerError | None


class Incident(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request that was refused or failed, or a handshake that did."""

    at: float
    direction: str
    code: str
    status: int = 0
    detail: str = ""
    method: str = ""
    path: str = ""
    peer: str = ""
    rule: str = ""
    request_id: str = ""


class Status(msgspec.Struct, frozen=True):
    """What the status page shows."""

    version: str
    now: float
    started_at: float
    workers: int
    tasks: int
    """asyncio's tasks: a few that last, and one for whatever cannot be answered at once."""
    readiness: Readiness
    identity: Identity
    gateway: Gateway
    listeners: dict[str, str | None]
    settings: dict[str, str]
    """Some that tell what this mesh does, by their key."""
    bucket_bounds: list[float]
    traffic: dict[str, Traffic]
    decisions: dict[str, int]
    targets: list[Peer]
    callers: list[Peer]
    incidents: list[Incident]
    """The last ones, the newest first."""


class WorkerReport(msgspec.Struct, frozen=True):
    """All that one process tells."""

    pid: int
    metrics: list[Family]
    status: Status

"""This machine's side: settings, listeners, the running sidecar, the backend, open files."""

from __future__ import annotations

import asyncio
import re
import resource
import time
from collections.abc import Callable

import msgspec

from dstack_mesh import listen
from dstack_mesh.check.result import Group, Result, failed, ok, skipped, warning
from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.model import Address, Role, TcpAddress
from dstack_mesh.ops.readiness import backend_answers
from dstack_mesh.relay.call import CallError, call
from dstack_mesh.relay.dial import open_socket, reason
from dstack_mesh.settings.load import Loaded
from dstack_mesh.settings.tree import Settings

PATIENCE = 5.0
"""Seconds for one answer of something on this machine."""

_LIMIT = 1024 * 1024
_EXPIRY = re.compile(rb"^dstack_mesh_identity_expiry_timestamp_seconds ([0-9.e+]+)$", re.MULTILINE)
_SPARE_FILES = 64

Failures = (OSError, CallError, TimeoutError)


class _Check(msgspec.Struct):
    ok: bool
    reason: str


class _Report(msgspec.Struct):
    ready: bool
    checks: dict[str, _Check]


def settings_group(loaded: Loaded) -> Group:
    """Say what is worth knowing of the settings; wrong ones do not come this far."""
    given = sum(source.kind != "default" for source in loaded.sources.values())
    results = [ok("the settings are valid", f"{given} given, see dstack-mesh config")]
    results += [
        warning("no setting is doubtful", text, "correct it, or leave it if it is meant")
        for text in loaded.warnings
        if not text.startswith("dstack.agent: ")  # the guest agent's own check tells
    ]
    return Group("settings", tuple(results))


class LocalChecks:
    """Looks at the listeners' addresses, and at the mesh behind them if one runs."""

    def __init__(
        self,
        settings: Settings,
        snapshot: Snapshot | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`snapshot` is who we are, to recognise our own mesh on the inbound listener."""
        self._settings = settings
        self._snapshot = snapshot
        self._clock = clock

    async def listeners(self) -> Group:
        """Each address is free, or our mesh has it."""
        settings = self._settings
        inbound = settings.inbound
        rows: list[tuple[str, Address | None, str]] = [
            ("outbound", settings.outbound.listen, "/gateway"),
            ("admin", settings.admin.listen, "/readyz"),
        ]
        if inbound.mode == "nginx":
            rows.append(("auth", inbound.auth_listen, "/health"))
        elif inbound.mode == "embedded" and inbound.backend is not None:
            rows.append(("inbound", inbound.listen, ""))
        results = [await self._listener(*row) for row in rows]
        if inbound.mode == "off" or (inbound.mode == "embedded" and inbound.backend is None):
            why = "inbound.mode is off" if inbound.mode == "off" else "no MESH_BACKEND"
            results.append(skipped("inbound can listen", why))
        return Group("listeners", tuple(results))

    async def sidecar(self) -> Group:
        """The mesh that runs here is ready, and its certificate current."""
        name, renewal = "the sidecar is ready", "its certificate is renewed in time"
        address = self._settings.admin.listen
        if address is None or (isinstance(address, TcpAddress) and address.port == 0):
            why = "admin.listen is off or any free port"
            return Group("sidecar", (skipped(name, why), skipped(renewal, why)))
        where = listen.reachable(address)
        try:
            status, body = await _ask(where, "/readyz")
            report = msgspec.json.decode(body, type=_Report) if status in (200, 503) else None
            _, metrics = await _ask(where, "/metrics")
        except ConnectionRefusedError:
            return Group("sidecar", (_not_running(name, where), skipped(renewal, "none runs")))
        except FileNotFoundError:
            return Group("sidecar", (_not_running(name, where), skipped(renewal, "none runs")))
        except (*Failures, ValueError) as error:
            why = f"{where}: {_why(error)}"
            remedy = (
                "another program may have this address, or the sidecar stands still: restart it"
            )
            return Group("sidecar", (failed(name, why, remedy), skipped(renewal, "not known")))
        if report is None:
            why, remedy = f"{where} answers with status {status}", "that is another program"
            return Group("sidecar", (failed(name, why, remedy), skipped(renewal, "not known")))
        return Group("sidecar", (_ready(name, report), self._renewal(renewal, metrics)))

    async def backend(self) -> Group:
        """The application takes connections."""
        name, address = "the backend takes connections", self._settings.inbound.backend
        if address is None or self._settings.inbound.mode == "off":
            return Group("backend", (skipped(name, "no MESH_BACKEND, or inbound is off"),))
        answers, why = await backend_answers(address, PATIENCE)
        remedy = "start the application, or correct MESH_BACKEND"
        return Group("backend", (ok(name, why) if answers else failed(name, why, remedy),))

    def files(self) -> Group:
        """A process may open more files than it may have connections at a listener."""
        name = "enough files may be open"
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        wanted = self._settings.max_connections + _SPARE_FILES
        if hard == resource.RLIM_INFINITY or hard >= wanted:
            shown = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
            return Group("limits", (ok(name, f"{shown}; a full listener wants {wanted}"),))
        detail = f"{hard}, and a listener full by MESH_MAX_CONNECTIONS wants {wanted}"
        remedy = f"raise it (ulimit -Hn {wanted}, LimitNOFILE=, --ulimit), or lower the setting"
        return Group("limits", (warning(name, detail, remedy),))

    async def _listener(self, what: str, address: Address | None, path: str) -> Result:
        name = f"{what} can listen"
        if address is None:
            return skipped(name, "off")
        if isinstance(address, TcpAddress) and address.port == 0:
            return ok(name, f"{address}: any free port")
        where = listen.reachable(address)
        try:
            async with asyncio.timeout(PATIENCE):
                (await open_socket(asyncio.get_running_loop(), where)).close()
        except (OSError, TimeoutError):
            return _free(name, address)
        ours = await (_is_mesh(where, path) if path else self._is_our_inbound(where))
        if ours is None:
            return warning(
                name,
                f"something listens on {address}, and without an identity it can't be told what",
                "see the guest agent and identity above",
            )
        if not ours:
            remedy = f"end it, or set MESH_{what.upper()}_LISTEN to another address"
            return failed(name, f"another program listens on {address}", remedy)
        return ok(name, f"{address}: our mesh has it")

    async def _is_our_inbound(self, where: Address) -> bool | None:
        """Tell whether our own app answers there; None where it is not known who we are."""
        snapshot = self._snapshot
        if snapshot is None:
            return None
        try:
            async with asyncio.timeout(PATIENCE):
                sock = await open_socket(asyncio.get_running_loop(), where)
                _, writer = await asyncio.open_connection(
                    sock=sock, ssl=snapshot.client_context, server_hostname=""
                )
                try:
                    tls = writer.get_extra_info("ssl_object")
                    peer = snapshot.peers.identify(tls, Role.TARGET)
                finally:
                    writer.transport.abort()
        except Exception:  # not TLS, not our KMS, or a chain that is refused: not ours
            return False
        return peer is not None and peer.app_id == snapshot.app_id

    def _renewal(self, name: str, metrics: bytes) -> Result:
        found = _EXPIRY.search(metrics)
        if found is None:
            return skipped(name, "it has no certificate yet")
        left, lifetime = float(found[1]) - self._clock(), self._settings.tls.lifetime
        if left <= 0:
            remedy = "see the guest agent above, and identity_fetch_failed in the sidecar's log"
            return failed(name, f"it ended {-left:.0f} s ago", remedy)
        if self._settings.tls.cert_file is None and left < lifetime / 4:
            remedy = "it is due at 2/3 of the lifetime: see identity_fetch_failed in its log"
            return warning(name, f"{left:.0f} s are left of {lifetime:.0f}", remedy)
        return ok(name, f"{left:.0f} s are left")


def _not_running(name: str, where: Address) -> Result:
    remedy = "start it: dstack-mesh run"
    return warning(name, f"none runs here: nobody listens on {where}", remedy)


def _ready(name: str, report: _Report) -> Result:
    reasons = [f"{key}: {one.reason}" for key, one in report.checks.items() if not one.ok]
    if report.ready:
        return ok(name, "; ".join(one.reason for one in report.checks.values()))
    return failed(name, "; ".join(reasons), "do what the checks above say; it asks again by itself")


def _free(name: str, address: Address) -> Result:
    try:
        sock = listen.bind(address)
    except listen.ListenError as error:
        return failed(name, str(error), "choose another address, or do what the reason says")
    sock.close()
    listen.unlink_if_ours(sock)
    return ok(name, f"{address} is free")


async def _is_mesh(where: Address, path: str) -> bool:
    """Tell by one answer whether a mesh's plain listener is there."""
    try:
        status, body = await _ask(where, path)
    except Failures:
        return False
    if path == "/health":
        return status == 200 and body == b"OK\n"
    try:
        answer = msgspec.json.decode(body, type=dict[str, object])
    except ValueError:
        return False
    if path == "/gateway":
        return "gateway_domain" in answer or answer.get("code") == "gateway_unknown"
    return {"ready", "checks"} <= answer.keys()


async def _ask(where: Address, path: str) -> tuple[int, bytes]:
    async with asyncio.timeout(PATIENCE):
        return await call(where, "GET", path, host="localhost", limit=_LIMIT)


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not error.errno:
        return f"no answer within {PATIENCE:g} s"
    return reason(error)

"""The sidecar: the only place where the parts are wired, started, drained and ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from pathlib import Path
from typing import Any

from dstack_mesh import __version__, listen, reload
from dstack_mesh.bindings import bind_all, bound_addresses
from dstack_mesh.dstack.agent import AgentClient
from dstack_mesh.dstack.gateway import GatewayDirectory
from dstack_mesh.identity.source import AgentSource, CredentialSource, FileSource
from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.inbound.auth_service import AuthService
from dstack_mesh.inbound.compiled import compile_inbound
from dstack_mesh.inbound.listener import TlsListener
from dstack_mesh.inbound.terminator import InboundOptions, Terminator
from dstack_mesh.log import event
from dstack_mesh.ops.admin import Admin
from dstack_mesh.ops.journal import Access, Journal
from dstack_mesh.ops.metrics import Metrics
from dstack_mesh.ops.parts import Parts
from dstack_mesh.ops.readiness import ReadinessChecks, backends_answer
from dstack_mesh.ops.report import WorkerReport
from dstack_mesh.ops.reporter import Reporter, shown_settings
from dstack_mesh.outbound.proxy import OutboundOptions, OutboundProxy
from dstack_mesh.policy.current import Current
from dstack_mesh.relay.deadlines import NEVER, Timeouts
from dstack_mesh.relay.interfaces import Handler
from dstack_mesh.relay.listeners import Listeners
from dstack_mesh.relay.pool import Pool
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.worker import Worker
from dstack_mesh.settings.tree import Settings, TlsSettings
from dstack_mesh.workers.seat import Seat

log = logging.getLogger(__name__)

_ADMIN_CONNECTIONS = 256
_ADMIN_SECONDS = 2.0
"""For who is being answered by a worker that ends."""

_TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Sidecar:
    """Every part of one mesh, wired by its settings."""

    def __init__(self, settings: Settings, seat: Seat | None = None) -> None:
        """`seat` is what a worker process has from its supervisor; None: there is but this one."""
        self.settings = settings
        self._seat = seat
        self.metrics = Metrics(__version__)
        self.journal = Journal(settings.log.access)
        self._agent = AgentClient(settings.dstack.agent)
        self.identity = IdentityStore(
            _source(settings.tls, self._agent),
            lifetime=settings.tls.lifetime,
            min_version=_TLS_VERSIONS[settings.tls.min_version],
            known_root=seat.known_root if seat is not None else None,
        )
        self.directory = GatewayDirectory(
            configured=settings.dstack.gateway_domain,
            sys_config=Path(settings.dstack.sys_config),
        )
        self.policy = Current(*compile_inbound(settings.inbound))
        self.worker = Worker(asyncio.get_running_loop(), _timeouts(settings))
        self._pool = Pool(self.worker)
        self._outbound = self._service("outbound")
        self._inbound = self._service("inbound")
        self._admin = Service(self.worker, "admin", max_connections=_ADMIN_CONNECTIONS)
        self._proxy = self._make_proxy()
        self._listener = self._make_listener()
        self._auth = self._make_auth()
        self._draining = False
        self._sockets: dict[str, listen.ListeningSocket] = {}
        self._bound = bound_addresses(self._sockets)
        self._listeners = Listeners(self.worker.loop)
        if seat is not None:
            self._listeners = Listeners(self.worker.loop, seat.share_of)
        self._tasks: list[asyncio.Task[None]] = []
        self.identity.subscribe(self._renewed)
        self.reporter = self._make_reporter()

    # Wiring.

    def _service(self, direction: str) -> Service:
        limit = self.settings.max_connections
        return Service(
            self.worker,
            direction,
            max_connections=limit,
            tally=self.metrics.tally(direction),
            record=self.journal.recorder,
            failed=self.journal.failed,
            refused=self.journal.refused,
        )

    def _make_proxy(self) -> OutboundProxy:
        settings = self.settings
        options = OutboundOptions(
            default_port=settings.outbound.default_port,
            expose_agent=settings.outbound.agent,
            agent=settings.dstack.agent,
            gateway_connect=settings.dstack.gateway_connect,
            connect_timeout=settings.outbound.connect_timeout,
        )
        count = functools.partial(self.metrics.count_handshake, "outbound")
        agent = self.metrics.tally("agent")
        return OutboundProxy(self._pool, self.identity, self.directory, options, count, agent)

    def _make_listener(self) -> TlsListener | None:
        """Make the embedded terminator; there is none without a backend."""
        settings = self.settings
        inbound = settings.inbound
        backend = inbound.backend
        if backend is None or inbound.mode != "embedded" or inbound.listen is None:
            return None
        options = InboundOptions(
            backend=backend,
            policy=self.policy,
            connect_timeout=settings.outbound.connect_timeout,
        )
        terminator = Terminator(self._pool, self.identity, options, self.metrics.count_decision)
        limit = settings.max_connections
        count = functools.partial(self.metrics.count_handshake, "inbound")
        failed = self.journal.handshake_failed
        return TlsListener(self._inbound, terminator, self.identity, limit, count, failed)

    def _make_auth(self) -> AuthService | None:
        """Make what nginx asks in nginx mode; the backend is nginx's own affair there."""
        inbound = self.settings.inbound
        if inbound.mode != "nginx":
            return None
        return AuthService(self.identity, self.policy, self.metrics.count_decision)

    def _make_reporter(self) -> Reporter:
        settings = self.settings
        is_on = self._listener is not None or self._auth is not None
        callers = self._listener.terminator if self._listener is not None else self._auth
        parts = Parts(
            version=__version__,
            metrics=self.metrics,
            journal=self.journal,
            identity=self.identity,
            directory=self.directory,
            worker=self.worker,
            services=(self._outbound, self._inbound),
            targets=self._proxy.peers,
            callers=callers.peers if callers is not None else None,
            readiness=ReadinessChecks(
                identity=self._identity_state,
                gateway=self._gateway_state if settings.outbound.listen is not None else None,
                backend=self._backend_state if is_on else None,
                draining=lambda: self._draining,
            ),
            bound=self.bound,
            settings=lambda: shown_settings(settings, self.policy, self.journal),
            label_apps=settings.admin.label_apps,
        )
        return Reporter(parts)

    async def _collect(self, include_backend: bool) -> list[WorkerReport]:
        """See `Collect`."""
        own = await self._report(include_backend)
        if self._seat is None:
            return [own]
        return await self._seat.mailbox.collect(own, include_backend)

    async def _report(self, include_backend: bool) -> WorkerReport:
        own = await self.reporter.collect(include_backend)
        return own if self._seat is None else self._seat.books.enter(own)

    # Life.

    async def start(self) -> None:
        """Open the outbound and admin listeners at once; inbound waits for an identity.

        Raises `ListenError`. All sockets are bound here, so that an address in use is told at once.
        """
        settings = self.settings
        if self._seat is None:
            bind_all(settings, self._sockets)
        else:
            self._sockets.update(self._seat.sockets)
            self._seat.mailbox.serve(self.worker.loop, self._report)
        self._bound = bound_addresses(self._sockets)  # they outlive their sockets while draining
        self._serve("outbound", self._outbound, self._proxy)
        if settings.admin.listen is not None:
            self._serve("admin", self._admin, Admin(self._collect, settings.admin.listen))
        self._tasks = [
            asyncio.create_task(self.identity.run()),
            asyncio.create_task(self.directory.run()),
        ]

    async def wait_open(self) -> None:
        """Open inbound once there is an identity; return when every listener is open."""
        await self.identity.wait_loaded()
        if self._listener is not None:
            sock = self._sockets["inbound"]
            take, handshakes = self._listener.take, self._listener.handshakes
            self._listeners.serve_tls("inbound", sock, self._inbound, take, handshakes)
            self._say_listening("inbound")
        if self._auth is not None:
            self._serve("auth", self._inbound, self._auth)
        event(log, logging.INFO, "ready", **self.bound())

    def bound(self) -> dict[str, str | None]:
        """Give the addresses actually bound, by listener."""
        return self._bound

    def reloadable(self) -> tuple[reload.Part, ...]:
        """Give the parts whose settings may change while running."""
        return (
            reload.policy_part(self.policy),
            reload.identity_part(self.identity, lambda tls: _source(tls, self._agent)),
            reload.log_part(self._set_access),
        )

    def _set_access(self, access: Access) -> None:
        self.journal.access = access
        for service in (self._outbound, self._inbound):
            service.on_record = self.journal.recorder

    def status(self) -> str:
        """Say in one line how it is, for people."""
        if self._draining:
            inbound, outbound = len(self._inbound.connections), len(self._outbound.connections)
            return f"stopping: {inbound} inbound and {outbound} outbound connections left"
        states = [self._identity_state()]
        if self.settings.outbound.listen is not None:
            states.append(self._gateway_state())
        missing = [reason for ok, reason in states if not ok]
        return f"not ready: {'; '.join(missing)}" if missing else f"ready: {states[0][1]}"

    def announce_end(self) -> None:
        """Turn `/readyz` to 503, and go on serving: what is before us is draining."""
        self._draining = True

    async def drain(self) -> None:
        """Finish what is in flight, at the latest after `drain_timeout`.

        Inbound first: what another app asked of this one may need the outbound side to be answered.
        """
        self._draining = True
        event(log, logging.INFO, "draining", timeout=self.settings.drain_timeout)
        try:
            async with asyncio.timeout(self.settings.drain_timeout):
                self._stop_accepting("inbound")
                self._stop_accepting("auth")
                await self._inbound.drain()
                self._stop_accepting("outbound")
                await self._outbound.drain()
                await self._leave_admin()
        except TimeoutError:
            event(
                log,
                logging.WARNING,
                "drain_timeout",
                inbound=len(self._inbound.connections),
                outbound=len(self._outbound.connections),
            )

    def leave_listeners(self) -> None:
        """Close all listeners at once: another sidecar may be about to take the addresses."""
        for name in list(self._sockets):
            self._stop_accepting(name)

    async def _leave_admin(self) -> None:
        """Let siblings, who may have longer to drain, answer who asks from now on."""
        if self._seat is not None:
            self._stop_accepting("admin")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ADMIN_SECONDS):
                    await self._admin.drain()

    async def stop(self) -> None:
        """End everything at once."""
        self._listeners.abort()
        if self._listener is not None:
            self._listener.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for service in (self._outbound, self._inbound, self._admin):
            service.abort()
            await service.gone()
        self._pool.close()
        self.worker.close()
        for sock in self._sockets.values():
            sock.close()
            if self._seat is None:
                listen.unlink_if_ours(sock)
        await self._agent.aclose()
        if self._tasks:  # else the start has failed, and the error says all there is to say
            event(log, logging.INFO, "stopped")

    # What the parts tell each other.

    def _serve(self, name: str, service: Service, handler: Handler[Any]) -> None:
        if name in self._sockets:
            self._listeners.serve(name, self._sockets[name], service, handler)
            self._say_listening(name)

    def _stop_accepting(self, name: str) -> None:
        self._listeners.stop(name)
        if name in self._sockets:
            self._sockets[name].close()  # else who comes now would wait for nothing

    def open_connections(self) -> int:
        """Count the connections of all listeners, and those to upstreams."""
        services = (self._outbound, self._inbound, self._admin)
        return sum(len(one.connections) for one in services) + len(self.worker.upstreams)

    def _say_listening(self, name: str) -> None:
        address = listen.bound_address(self._sockets[name])
        event(log, logging.INFO, "listening", listener=name, address=str(address))

    def _renewed(self, snapshot: Snapshot) -> None:
        """Let connections made under the older identity go as they fall idle."""
        self._pool.drain()

    def _identity_state(self) -> tuple[bool, str]:
        try:
            snapshot = self.identity.require()
        except Exception as error:
            return False, str(error)
        return True, f"app {snapshot.app_id}"

    async def _backend_state(self) -> tuple[bool, str]:
        backend = self.settings.inbound.backend
        if backend is None:
            return True, "nginx mode, and no backend is set: which it is only nginx knows"
        return await backends_answer([backend, *self.policy.routes.backends])

    def _gateway_state(self) -> tuple[bool, str]:
        if self.directory.current is None:
            return False, self.directory.reason or "not known yet"
        return True, str(self.directory.text)


def _source(tls: TlsSettings, agent: AgentClient) -> CredentialSource:
    if tls.cert_file is not None and tls.key_file is not None and tls.ca_file is not None:
        return FileSource(Path(tls.cert_file), Path(tls.key_file), Path(tls.ca_file))
    return AgentSource(agent, tls.lifetime)


def _timeouts(settings: Settings) -> Timeouts:
    return Timeouts(
        head=settings.head_timeout,
        idle=settings.idle_timeout,
        response=settings.outbound.response_timeout or NEVER,
        connect=settings.outbound.connect_timeout,
    )

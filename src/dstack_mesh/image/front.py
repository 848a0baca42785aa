"""nginx in front of the mesh: its identity, its configuration and its process.

nginx starts once there is an identity. Renewals need no reload (see `identity_files`); it is
reloaded only when the backend's name leads somewhere else, or the KMS has re-made its root's
certificate. A configuration is tried before it is put in place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_mesh.dstack.agent import AgentClient
from dstack_mesh.identity.source import AgentSource, FileSource
from dstack_mesh.identity.store import IdentityStore
from dstack_mesh.image.processes import Child, ProcessError
from dstack_mesh.inbound.nginx_config import nginx_options, whole_file
from dstack_mesh.log import event
from dstack_mesh.model import Address, TcpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from dstack_mesh.identity.snapshot import Snapshot
    from dstack_mesh.identity.source import CredentialSource
    from dstack_mesh.identity.tls import Credentials
    from dstack_mesh.image.identity_files import IdentityFiles
    from dstack_mesh.settings.tree import Settings

    Resolve = Callable[[str], Awaitable[set[str]]]

log = logging.getLogger(__name__)

NGINX = "/usr/sbin/nginx"
WATCH_SECONDS = 2.0
"""Between two looks at where the backend is."""

_TEST_SECONDS = 20.0


class Kept:
    """A source of credentials that keeps what it gave last, for the one who hears it was good."""

    def __init__(self, source: CredentialSource) -> None:
        self.description = source.description
        self.last: Credentials | None = None
        self._source = source
        if isinstance(source, FileSource):
            self.changed = source.changed

    async def fetch(self) -> Credentials:
        """See `CredentialSource`."""
        self.last = await self._source.fetch()
        return self.last


class Front:
    """Runs nginx until it ends or `quit` ends it.

    `file` is where its configuration goes; `state` is the directory of nginx's user, and `command`
    gives the command line that runs another as that user.
    """

    def __init__(
        self,
        settings: Settings,
        files: IdentityFiles,
        file: Path,
        state: Path,
        command: Callable[[Sequence[str]], list[str]],
        resolve: Resolve | None = None,
    ) -> None:
        self._settings = settings
        self._files = files
        self._file = file
        self._state = state
        self._command = command
        self._resolve = resolve or resolve_host
        self._source = Kept(_source(settings))
        self.identity = IdentityStore(
            self._source,
            lifetime=settings.tls.lifetime,
            min_version=ssl.TLSVersion.TLSv1_3,  # of contexts that nobody uses
        )
        self.identity.subscribe(self._switch)
        self._servers: tuple[Address, ...] = ()
        self._reload_due = asyncio.Event()
        self._nginx: Child | None = None

    async def run(self) -> str:
        """Run; return how nginx ended. Raises ProcessError, and OSError where it cannot be run."""
        tasks = [asyncio.create_task(self.identity.run())]
        try:
            await self.identity.wait_loaded()
            if not self._files.current.exists():
                raise ProcessError("the identity could not be written for nginx; see the log above")
            self._servers = await self._backend()
            # Not tried first: to try it nginx opens the listener, for callers that it then drops.
            self._draft().replace(self._file)
            self._nginx = await Child.start("nginx", self._nginx_command(self._file), os.environ)
            tasks.append(asyncio.create_task(self._watch_backend()))
            tasks.append(asyncio.create_task(self._reload_when_due()))
            return await self._nginx.ended()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def quit(self, seconds: float) -> None:
        """Have nginx finish what is in flight, and end it after `seconds`."""
        if self._nginx is not None:
            await self._nginx.end((signal.SIGQUIT, signal.SIGTERM), seconds)

    def kill(self) -> None:
        """End nginx at once."""
        if self._nginx is not None:
            self._nginx.kill()

    def _switch(self, snapshot: Snapshot) -> None:
        """Put the identity in place that was found good, for all handshakes from now on."""
        if self._source.last is None:
            raise AssertionError("a snapshot is of credentials that were fetched")
        another_root = self._files.switch(self._source.last)
        event(log, logging.INFO, "nginx_identity", generation=snapshot.generation)
        if another_root and snapshot.generation > 1:
            self._reload_due.set()

    def _nginx_command(self, file: Path, *options: str) -> list[str]:
        no_daemon = "daemon off;"
        return self._command([NGINX, "-e", "stderr", "-c", str(file), "-g", no_daemon, *options])

    def _draft(self) -> Path:
        """Write the configuration beside the one in place."""
        options = nginx_options(self._settings, self._state)
        options = replace(
            options,
            ca_file=str(self._files.ca_file),
            identity_link=str(self._files.current),
            backend_servers=self._servers or (UnixAddress(f"{self._state}/no-backend.sock"),),
        )
        draft = self._file.with_suffix(".new")
        draft.write_text(whole_file(options))
        draft.chmod(0o644)
        return draft

    async def _configure(self) -> None:
        """Put a new configuration in place if nginx takes it. Raises ProcessError."""
        draft = self._draft()
        tried = await asyncio.create_subprocess_exec(
            *self._nginx_command(draft, "-t", "-q"),
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(_TEST_SECONDS):
            _, said = await tried.communicate()
        if tried.returncode != 0:
            raise ProcessError(f"nginx does not take its configuration: {said.decode().strip()}")
        draft.replace(self._file)

    async def _watch_backend(self) -> None:
        """Look where the backend is: a container that was started again may have moved."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            servers = await self._backend()
            if servers and servers != self._servers:
                self._servers = servers
                self._reload_due.set()

    async def _reload_when_due(self) -> None:
        while self._nginx is not None:
            await self._reload_due.wait()
            self._reload_due.clear()
            try:
                await self._configure()
            except (ProcessError, OSError, TimeoutError) as error:
                event(log, logging.ERROR, "nginx_reload_refused", reason=str(error))
                continue
            self._nginx.signal(signal.SIGHUP)
            backend = " ".join(map(str, self._servers))
            event(log, logging.INFO, "nginx_reloaded", backend=backend)

    async def _backend(self) -> tuple[Address, ...]:
        """Give where the backend is now; empty where its name does not resolve."""
        backend = self._settings.inbound.backend
        if not isinstance(backend, TcpAddress):
            return (backend,) if backend is not None else ()
        try:
            hosts = await self._resolve(backend.host)
        except OSError as error:
            level = logging.DEBUG if self._servers else logging.WARNING
            event(log, level, "backend_unknown", backend=str(backend), reason=str(error))
            return ()
        return tuple(TcpAddress(host, backend.port) for host in sorted(hosts))


async def resolve_host(host: str) -> set[str]:
    """Give the addresses of `host`, as this machine resolves names. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}


def _source(settings: Settings) -> CredentialSource:
    tls = settings.tls
    if tls.cert_file is not None and tls.key_file is not None and tls.ca_file is not None:
        return FileSource(Path(tls.cert_file), Path(tls.key_file), Path(tls.ca_file))
    return AgentSource(AgentClient(settings.dstack.agent), tls.lifetime)

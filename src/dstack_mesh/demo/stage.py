"""What the demo plays on: a simulated dstack, two sidecars and a backend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dstack_mesh.demo.act import short
from dstack_mesh.demo.sidecar import Sidecar, SidecarError
from dstack_mesh.model import AppId
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.world import SimApp, World, WorldError, app_id_of

if TYPE_CHECKING:
    from types import TracebackType

CALLER, TARGET = "shop", "billing"
OTHER = "ledger"
"""An app that the gateway has an address for and that nobody runs."""

_SOCKET_PATH_ROOM = 80
"""Bytes for the directory, so that the sockets in it keep within the 107 of a unix socket."""


class StageError(Exception):
    """The demo can't be set up here; the text says why."""


class Stage:
    """Use as `async with Stage() as stage`. Raises `StageError`, and leaves nothing behind."""

    world: World
    backend: Backend
    caller: Sidecar
    target: Sidecar

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except (OSError, WorldError, SidecarError) as error:
            await self._stack.aclose()
            raise StageError(str(error)) from error
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @property
    def caller_app(self) -> SimApp:
        """The app that calls."""
        return self.world.apps[CALLER]

    @property
    def target_app(self) -> SimApp:
        """The app that is called; it has a backend."""
        return self.world.apps[TARGET]

    @property
    def other_app_id(self) -> AppId:
        """The app at whose address somebody else answers: see `lead_astray`."""
        return app_id_of(OTHER)

    @property
    def sidecars(self) -> tuple[Sidecar, Sidecar]:
        """Both of them."""
        return self.caller, self.target

    def who(self, app_id: str) -> str:
        """Name an app-id that somebody told, for a reader."""
        found = [app.name for app in self.world.apps.values() if app.app_id == app_id]
        return f"{short(app_id)}, {found[0]}" if found else short(app_id) or "missing"

    def lead_astray(self, app_id: AppId, host: str, port: int | None = None) -> None:
        """Have the gateway lead `app_id` to `host` from now on, as a hostile gateway could."""
        self.world.gateway.remove_route(app_id)
        self.world.gateway.add_route(app_id, host, port)

    async def wait_fallen(self) -> str:
        """Return when a sidecar has ended by itself, with how and why."""
        ends = [asyncio.ensure_future(sidecar.wait_ended()) for sidecar in self.sidecars]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return "; ".join(s.describe_end() for s in self.sidecars if s.ended is not None)

    def fallen(self) -> str:
        """Say which sidecar has ended by itself; empty while both run."""
        ended = [s for s in self.sidecars if s.ended is not None]
        return "; ".join(s.describe_end(with_log=False) for s in ended)

    async def _start(self) -> None:
        push = self._stack.enter_async_context
        directory = Path(self._stack.enter_context(_temporary_directory()))
        self.world = await push(World([CALLER, TARGET], directory))
        self.backend = Backend(TARGET)
        self._stack.push_async_callback(self.backend.aclose)
        address = await self.backend.start()
        self.caller = self._sidecar(self.caller_app)
        self.target = self._sidecar(self.target_app, MESH_BACKEND=str(address))
        for sidecar in self.sidecars:
            self._stack.push_async_callback(sidecar.stop)
            await sidecar.start()
        await asyncio.gather(*(sidecar.wait_ready() for sidecar in self.sidecars))

    def _sidecar(self, app: SimApp, **environ: str) -> Sidecar:
        own = {
            **app.env,
            "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
            "MESH_ADMIN_LISTEN": "127.0.0.1:0",
            "MESH_LOG_FORMAT": "text",
            "MESH_DRAIN_TIMEOUT": "1s",
        }
        return Sidecar(app.name, {**own, **environ}, app.directory)


def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Make the directory. Raises `OSError`, also where sockets in it would have too long a path."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _SOCKET_PATH_ROOM - len("/dstack-demo-12345678"):
        raise OSError(
            f"{parent}: the path is too long for unix sockets in it; set TMPDIR to a shorter one"
        )
    return tempfile.TemporaryDirectory(prefix="dstack-demo-", ignore_cleanup_errors=True)

"""SIGHUP: settings that may change while the sidecar runs are read again, all of them or none.

Each part first prepares what is new, which may fail; only when all have is anything changed, and
that cannot fail. So a mistake in one place never leaves a mixture in effect.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dstack_mesh.identity.source import CredentialSource, SourceError
from dstack_mesh.identity.store import IdentityStore
from dstack_mesh.inbound.compiled import compile_inbound
from dstack_mesh.log import event
from dstack_mesh.ops import logs
from dstack_mesh.ops.journal import Access
from dstack_mesh.policy.current import Current
from dstack_mesh.settings.errors import SettingsError
from dstack_mesh.settings.load import Loaded, value_of
from dstack_mesh.settings.rules import FIELDS, TABLES
from dstack_mesh.settings.schema import SCHEMA
from dstack_mesh.settings.tree import Settings, TlsSettings

log = logging.getLogger(__name__)

TLS_FILES = ("tls.cert_file", "tls.key_file", "tls.ca_file")


@dataclass(frozen=True, slots=True)
class Part:
    """What takes part in a reload, and the settings that it answers for."""

    keys: tuple[str, ...]
    prepare: Callable[[Settings, Settings], Awaitable[Callable[[], None]]]
    """Called with the settings before and now; gives what puts them into effect, which must not
    fail. Raises `SourceError` or `SettingsError` where they cannot be."""


class Supervisor(Protocol):
    """Who is told of a reload: see `ops.systemd.Notifier`."""

    def reloading(self) -> None:
        """It begins."""
        ...

    def reloaded(self) -> None:
        """It is over, whatever came of it."""
        ...


class Reloader:
    """Reads the settings again when asked, one time after the other."""

    def __init__(
        self,
        loaded: Loaded,
        parts: Sequence[Part],
        supervisor: Supervisor,
        current: Loaded | None = None,
    ) -> None:
        """`loaded` is what was started with, `current` what reloads have since made of it."""
        self._started = loaded
        self._current = current or loaded
        self._parts = parts
        self._supervisor = supervisor
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Have it done soon; asked again before it has begun, it is done once."""
        self._asked.set()

    async def run(self) -> None:
        """Reload whenever asked, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._supervisor.reloading()
            try:
                await self.reload()
            finally:
                self._supervisor.reloaded()

    async def reload(self) -> bool:
        """Reload once; tell in the log what came of it, and give whether it was done."""
        try:
            new = self._current.again()
            before, now = self._current.settings, new.settings
            changes = [await part.prepare(before, now) for part in self._parts]
        except (SettingsError, SourceError) as error:
            return self._failed(str(error))
        except Exception as error:  # whatever went wrong, what was in effect still is
            return self._failed(f"{type(error).__name__}: {error}")
        for change in changes:
            change()
        self._tell(new)
        self._current = new
        return True

    def _failed(self, reason: str) -> bool:
        event(
            log,
            logging.ERROR,
            "settings_reload_failed",
            reason=reason,
            kept="the settings in effect before",
        )
        return False

    def _tell(self, new: Loaded) -> None:
        before = self._current
        for warning in new.warnings:
            if warning not in before.warnings:
                event(log, logging.WARNING, "settings_warning", detail=warning)
        if fixed := _differing(self._started, new, reloadable=False):
            event(
                log,
                logging.WARNING,
                "settings_need_restart",
                keys=fixed,
                detail="these cannot change while running: the values of the start stay in effect",
            )
        changed = _differing(before, new, reloadable=True)
        event(log, logging.INFO, "settings_reloaded", changed=changed)


def _differing(one: Loaded, other: Loaded, *, reloadable: bool) -> list[str]:
    keys = [setting.key for setting in SCHEMA if setting.reloadable is reloadable]
    if reloadable:
        keys += TABLES
    return [key for key in keys if value_of(one.settings, key) != value_of(other.settings, key)]


def in_effect(started: Settings, reloaded: Settings) -> Settings:
    """Give the settings of a process that was `started` and `reloaded`: only some may change."""
    settings = started
    for key in (*(one.key for one in SCHEMA if one.reloadable), *TABLES):
        section, _, name = key.partition(".")
        name = FIELDS.get(key, name)
        value = getattr(getattr(reloaded, section), name)
        part = dataclasses.replace(getattr(settings, section), **{name: value})
        settings = dataclasses.replace(settings, **{section: part})
    return settings


def policy_part(current: Current) -> Part:
    """Put another policy and other routes in place; they count from the next request on."""

    async def prepare(before: Settings, now: Settings) -> Callable[[], None]:
        policy, routes = compile_inbound(now.inbound)
        return lambda: current.replace(policy, routes)

    return Part(("inbound.allow", "inbound.policy_mode", *TABLES), prepare)


def identity_part(
    store: IdentityStore, source_of: Callable[[TlsSettings], CredentialSource]
) -> Part:
    """Read the certificate's files, where they are other ones or have another content.

    An identity from the guest agent is left: it is renewed when it is due.
    """

    async def prepare(before: Settings, now: Settings) -> Callable[[], None]:
        if _files(before) == _files(now) and not store.source_changed():
            return _nothing
        source = source_of(now.tls)
        snapshot = await store.prepare(source)
        return lambda: store.switch(source, snapshot)

    return Part(TLS_FILES, prepare)


def log_part(set_access: Callable[[Access], None]) -> Part:
    """Set the log's format and level, and by `set_access` which exchanges it tells of."""

    async def prepare(before: Settings, now: Settings) -> Callable[[], None]:
        def change() -> None:
            logs.setup(now.log.format, now.log.level)
            set_access(now.log.access)

        return change

    return Part(("log.format", "log.level", "log.access"), prepare)


def _files(settings: Settings) -> list[object]:
    return [value_of(settings, key) for key in TLS_FILES]


def _nothing() -> None:
    """Change nothing."""

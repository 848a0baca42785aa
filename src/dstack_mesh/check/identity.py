"""The guest agent, and who we are by what it issues or by files."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from dstack_mesh.check.result import Group, Result, failed, ok, skipped, warning
from dstack_mesh.dstack.agent import AgentClient, AgentError
from dstack_mesh.identity.snapshot import Snapshot, build_snapshot
from dstack_mesh.identity.source import (
    LOCAL_KEY_PROVIDER,
    AgentSource,
    CredentialSource,
    FileSource,
    SourceError,
)
from dstack_mesh.settings.tree import Settings

THROW_AWAY = 600.0
"""Seconds for which the certificate is good that only this check asks the agent for."""

FILES_END_SOON = 3600.0
"""Seconds: files that end sooner than this should have been replaced."""

EARLIEST = 1_767_225_600.0
"""2026-01-01: this program is younger than any clock that shows an earlier time."""

AGENT_TIMEOUT = 5.0

_TLS_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
_AGENT = "the guest agent answers"
_VERSION = "its version is known"
_ISSUES = "it issues a certificate with an app-id"
_CHAIN = "our chain holds"
_DATES = "our certificate is in date"
_CLOCK = "the clock is sane"


def has_files(settings: Settings) -> bool:
    """Tell whether the identity comes from files."""
    return settings.tls.cert_file is not None


class IdentityChecks:
    """Asks the agent, and makes of its answer, or of the files, the identity to go on with."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self.snapshot: Snapshot | None = None
        """Who we are, where the checks found that."""

        self._settings = settings
        self._clock = clock
        self._agent = AgentClient(settings.dstack.agent, AGENT_TIMEOUT)
        self._failure = ""

    async def agent(self) -> Group:
        """Look at the guest agent; with the identity from files it may be absent."""
        return Group("guest agent", tuple(await self._ask_agent()))

    async def identity(self) -> Group:
        """Look at our certificate; after `agent`."""
        if has_files(self._settings):
            await self._load(self._files())
        name = _CHAIN
        if self.snapshot is None:
            why = self._failure
            if has_files(self._settings):
                remedy = "put leaf and app CA, the leaf's key and the KMS root into the tls files"
                chain = failed(name, why, remedy)
            else:
                chain = skipped(name, "there is no certificate: see the guest agent above")
            return Group(
                "identity", (chain, skipped(_DATES, "there is none"), self._clock_sanity())
            )
        chain = ok(name, f"app {self.snapshot.app_id}, under the KMS root, by every chain rule")
        return Group("identity", (chain, self._dates(self.snapshot), self._clock_sanity()))

    async def _ask_agent(self) -> list[Result]:
        agent = self._agent
        try:
            version = await agent.version()
        except AgentError as error:
            if has_files(self._settings):
                remedy = "it is not needed for the identity; calls without a target need it"
                return [warning(_AGENT, error.detail, remedy)]
            remedy = "mount its socket into this container, or set DSTACK_AGENT_ADDRESS"
            unknown = "the agent does not answer"
            self._failure = error.detail
            return [
                failed(_AGENT, error.detail, remedy),
                skipped(_VERSION, unknown),
                skipped(_ISSUES, unknown),
            ]
        results = [ok(_AGENT, str(agent.address))]
        if version is None:
            results.append(
                warning(
                    _VERSION,
                    "it does not know the call: an older one, whose certificates last ten years",
                    "use a newer dstack image",
                )
            )
        else:
            results.append(ok(_VERSION, version))
        if has_files(self._settings):
            return [*results, skipped(_ISSUES, "the identity comes from files")]
        await self._load(AgentSource(agent, THROW_AWAY, subject="dstack-mesh check"))
        if self.snapshot is None:
            remedy = (
                "deploy it with a KMS" if self._failure == LOCAL_KEY_PROVIDER else "look at its log"
            )
            return [*results, failed(_ISSUES, self._failure, remedy)]
        return [*results, ok(_ISSUES, f"app {self.snapshot.app_id}")]

    async def _load(self, source: CredentialSource) -> None:
        tls = self._settings.tls
        try:
            self.snapshot = build_snapshot(
                await source.fetch(),
                1,
                lifetime=tls.lifetime,
                min_version=_TLS_VERSIONS[tls.min_version],
                now=self._clock(),
            )
        except SourceError as error:
            self._failure = error.detail

    def _files(self) -> FileSource:
        tls = self._settings.tls
        return FileSource(
            Path(tls.cert_file or ""), Path(tls.key_file or ""), Path(tls.ca_file or "")
        )

    def _dates(self, snapshot: Snapshot) -> Result:
        left = snapshot.not_after - self._clock()
        until = _iso(snapshot.not_after)
        if not has_files(self._settings):
            return ok(_DATES, f"the one issued for this check is good until {until}")
        if left < FILES_END_SOON:
            remedy = "replace the files; the mesh reads them again by itself"
            return warning(_DATES, f"it ends at {until}, in {left:.0f} s", remedy)
        return ok(_DATES, f"good until {until}")

    def _clock_sanity(self) -> Result:
        now = self._clock()
        if now < EARLIEST:
            remedy = "set it (NTP): certificates are judged by it"
            return failed(_CLOCK, f"it shows {_iso(now)}, before this program was made", remedy)
        return ok(_CLOCK, _iso(now))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

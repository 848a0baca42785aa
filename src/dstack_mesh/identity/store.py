"""Our own identity over time: the first fetch, the snapshot in use, and its renewal.

A snapshot is validated first and published then, by one assignment: both directions switch at
once, and nothing ever uses a key that does not fit its chain.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random as random_module
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dstack_mesh.errors import IdentityUnavailable
from dstack_mesh.identity.known_root import KnownRoot
from dstack_mesh.identity.snapshot import Snapshot as Snapshot
from dstack_mesh.identity.snapshot import build_snapshot as build_snapshot
from dstack_mesh.identity.source import SourceError
from dstack_mesh.log import event

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from dstack_mesh.identity.source import CredentialSource

logger = logging.getLogger(__name__)

FIRST_RETRY, LAST_RETRY = 1.0, 30.0
"""Seconds to the next attempt after a failure: doubling, up to a fifth less by jitter."""

LONGEST_SLEEP = 30.0
"""Seconds after which the wall clock is looked at again: it may have been set meanwhile."""

POLL = 1.0
"""Seconds between two looks at files."""

_RETRY_JITTER = 0.2
_RENEWAL_JITTER = 0.1
_CLOCK_TOLERANCE = 60.0


class IdentityStore:
    """Holds the snapshot in use. `run` keeps it current; the last good one stays until it expires.

    `lifetime` is in seconds. `known_root` is shared by processes that are one mesh. `clock`
    (seconds since 1970), `random` (0 to 1) and `sleep` are for tests. A source with a method
    `changed` (files) is read again when that is true; any other is asked again when the snapshot
    is due.
    """

    reason: str | None
    """Why there is no snapshot, or the last renewal's failure; None when all is well."""

    fetched: int
    """Snapshots loaded so far, the first one included."""

    failed: int
    """Attempts that gave none."""

    def __init__(
        self,
        source: CredentialSource,
        *,
        lifetime: float,
        min_version: ssl.TLSVersion,
        known_root: KnownRoot | None = None,
        clock: Callable[[], float] = time.time,
        random: Callable[[], float] = random_module.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.reason = f"{source.description} has not answered yet"
        self.fetched = 0
        self.failed = 0
        self._source = source
        self._changed: Callable[[], bool] | None = getattr(source, "changed", None)
        self._lifetime = lifetime
        self._min_version = min_version
        self._known_root = known_root or KnownRoot()
        self._clock = clock
        self._random = random
        self._sleep = sleep
        self._current: Snapshot | None = None
        self._loaded_at = self._renew_at = 0.0
        self._expiry_told = False
        self._loaded = asyncio.Event()
        self._subscribers: list[Callable[[Snapshot], None]] = []

    @property
    def current(self) -> Snapshot | None:
        """The snapshot in use, None while there is none yet. It may have expired: see `require`."""
        return self._current

    @property
    def source(self) -> str:
        """Where our certificates come from, for a reader."""
        return self._source.description

    @property
    def loaded_at(self) -> float:
        """When `current` was published, in seconds since 1970."""
        return self._loaded_at

    def require(self) -> Snapshot:
        """Return a snapshot that has not expired; raises `IdentityUnavailable` with the reason."""
        snapshot = self._current
        if snapshot is None:
            raise IdentityUnavailable(f"this mesh has no certificate yet: {self.reason}")
        if self._clock() >= snapshot.not_after:
            raise IdentityUnavailable(
                f"this mesh's own certificate expired at {_iso(snapshot.not_after)}: "
                f"{self.reason or 'its renewal is under way'}"
            )
        return snapshot

    def subscribe(self, callback: Callable[[Snapshot], None]) -> None:
        """Have `callback` called with each new snapshot, after `current` is that one."""
        self._subscribers.append(callback)

    async def wait_loaded(self) -> Snapshot:
        """Wait for the first snapshot and return the one in use; see `require`."""
        await self._loaded.wait()
        return self.require()

    def source_changed(self) -> bool:
        """Tell whether the source has other credentials than those in use, as far as it knows."""
        return self._changed is not None and self._changed()

    async def prepare(self, source: CredentialSource) -> Snapshot:
        """Fetch from `source` and validate as for a renewal, but publish nothing.

        Raises `SourceError`.
        """
        credentials = await source.fetch()
        snapshot = build_snapshot(
            credentials,
            self.fetched + 1,
            lifetime=self._lifetime,
            min_version=self._min_version,
            now=self._clock(),
        )
        self._check_root(snapshot, source)
        return snapshot

    def switch(self, source: CredentialSource, snapshot: Snapshot) -> None:
        """Use `source` from now on, and at once `snapshot`, which `prepare` made of it."""
        self._source = source
        self._changed = getattr(source, "changed", None)
        self._adopt(snapshot)

    async def run(self) -> None:
        """Fetch, then renew when due and retry when that fails, until cancelled."""
        failures = 0
        while True:
            failure = await self._fetch()
            if failure is None:
                failures = 0
                await self._until_due()
                continue
            delay = min(FIRST_RETRY * 2 ** min(failures, 10), LAST_RETRY)
            delay *= 1 - _RETRY_JITTER * self._random()
            failures += 1
            self._note_failure(failure, delay)
            await self._until_retry(delay)

    async def _fetch(self) -> str | None:
        """Fetch, validate and publish once; return why that failed, None when it did not."""
        source = self._source
        try:
            snapshot = await self.prepare(source)
        except SourceError as failure:
            return failure.detail
        except Exception as exc:  # whatever went wrong, the last good one serves and we ask again
            return f"{type(exc).__name__}: {exc}"
        if source is self._source:  # else another took its place meanwhile
            self._adopt(snapshot)
        return None

    def _adopt(self, snapshot: Snapshot) -> None:
        now = self._clock()
        jitter = 1 - _RENEWAL_JITTER * self._random()
        self._loaded_at = now
        self._renew_at = now + max((snapshot.renew_at - now) * jitter, FIRST_RETRY)
        generation = self.fetched + 1
        self._publish(replace(snapshot, renew_at=self._renew_at, generation=generation))

    def _check_root(self, new: Snapshot, source: CredentialSource) -> None:
        """Refuse another KMS: all peers verified so far were members of the one we know."""
        known, found = self._known_root.digest(), _digest(new)
        if known in (b"", found):
            return
        event(
            logger,
            logging.ERROR,
            "kms_root_changed",
            source=source.description,
            known_root_key_sha256=known.hex(),
            refused_root_key_sha256=found.hex(),
        )
        raise SourceError(
            f"{source.description} now gives a chain under another KMS root key, which is "
            "refused; restart the mesh if the KMS was replaced on purpose"
        )

    def _publish(self, snapshot: Snapshot) -> None:
        self._known_root.learn(_digest(snapshot))
        self._current = snapshot
        self.reason = None
        self.fetched += 1
        self._expiry_told = False
        event(
            logger,
            logging.INFO,
            "identity_loaded" if snapshot.generation == 1 else "identity_renewed",
            app_id=snapshot.app_id,
            not_after=_iso(snapshot.not_after),
            renew_at=_iso(snapshot.renew_at),
            generation=snapshot.generation,
            source=self._source.description,
        )
        self._loaded.set()
        for callback in self._subscribers:
            try:
                callback(snapshot)
            except Exception:  # a subscriber's mistake must not end the renewals
                logger.exception("identity_subscriber_failed")

    def _note_failure(self, reason: str, delay: float) -> None:
        self.failed += 1
        self.reason = reason
        event(
            logger,
            logging.WARNING,
            "identity_fetch_failed",
            reason=reason,
            retry_seconds=round(delay, 1),
            source=self._source.description,
        )

    async def _until_due(self) -> None:
        """Wait until the snapshot just published is to be replaced."""
        while True:
            now = self._clock()
            if self._changed is not None:
                if self._changed():
                    return
                pause = POLL
            elif self._loaded_at - _CLOCK_TOLERANCE <= now < self._renew_at:
                pause = self._renew_at - now
            else:  # due; or the clock was set back, and when it is due was reckoned by a wrong one
                return
            await self._pause(pause)

    async def _until_retry(self, delay: float) -> None:
        """Wait `delay` seconds, or for files until they change."""
        while delay > 0:
            pause = min(delay, POLL) if self._changed is not None else delay
            await self._pause(pause)
            delay -= pause
            if self._changed is not None and self._changed():
                return

    async def _pause(self, seconds: float) -> None:
        """Sleep so long, or less where the clock is to be looked at; tell an expiry meanwhile."""
        pause = min(seconds, LONGEST_SLEEP)
        await self._sleep(pause)
        snapshot = self._current
        if snapshot is None or self._expiry_told or self._clock() < snapshot.not_after:
            return
        self._expiry_told = True
        event(
            logger,
            logging.ERROR,
            "identity_expired",
            app_id=snapshot.app_id,
            not_after=_iso(snapshot.not_after),
            generation=snapshot.generation,
            reason=self.reason,
        )


def _digest(snapshot: Snapshot) -> bytes:
    return hashlib.sha256(snapshot.root_spki).digest()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

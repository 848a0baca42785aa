"""Our identity over time: first fetch, renewal, failures, and clocks that jump."""

from __future__ import annotations

import asyncio
import datetime
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from tests.identity.conftest import APP_A, APP_B, Issued, Kms, issue

from dstack_mesh.errors import IdentityUnavailable
from dstack_mesh.identity.source import FileSource, SourceError
from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.identity.tls import Credentials

START = 1_700_000_000.0
DAY = 86_400.0
DEADLINE = 10.0


class World:
    """A clock that only sleeping moves, and that the test lets run."""

    def __init__(self) -> None:
        self.now = START
        self.random = 0.0
        self._asleep: asyncio.Queue[float] = asyncio.Queue()
        self._awake: asyncio.Queue[float] = asyncio.Queue()

    async def sleep(self, seconds: float) -> None:
        self._asleep.put_nowait(seconds)
        self.now += await self._awake.get()

    async def asleep(self) -> float:
        """Wait until the store sleeps; return for how long it means to."""
        return await asyncio.wait_for(self._asleep.get(), DEADLINE)

    async def pass_on(self, seconds: float) -> float:
        """End the sleep, the clock having moved by `seconds`; return the next sleep's length."""
        self._awake.put_nowait(seconds)
        return await self.asleep()

    async def let_pass(self, until: float, step: float) -> None:
        """Sleep on in whole sleeps until the clock shows `until`; `step` is the sleep begun."""
        while self.now + step < until:
            step = await self.pass_on(step)
        await self.pass_on(until - self.now)


class Source:
    """Gives one after the other what it is told to give; an exception is raised."""

    description = "the test's source"

    def __init__(self, *gives: Issued | Exception) -> None:
        self.gives: list[Issued | Exception] = list(gives)
        self.fetches = 0

    async def fetch(self) -> Credentials:
        self.fetches += 1
        given = self.gives.pop(0) if len(self.gives) > 1 else self.gives[0]
        if isinstance(given, Exception):
            raise given
        return given.credentials


@asynccontextmanager
async def running(store: IdentityStore) -> AsyncIterator[None]:
    task = asyncio.create_task(store.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def make(source: Source | FileSource, world: World, lifetime: float = DAY) -> IdentityStore:
    return IdentityStore(
        source,
        lifetime=lifetime,
        min_version=ssl.TLSVersion.TLSv1_3,
        clock=lambda: world.now,
        random=lambda: world.random,
        sleep=world.sleep,
    )


def until(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(START + seconds, datetime.UTC)


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def fields(caplog: pytest.LogCaptureFixture, name: str) -> dict[str, object]:
    record = next(record for record in caplog.records if record.getMessage() == name)
    return dict(record.fields)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dstack_mesh")


def test_before_the_first_answer_there_is_a_reason(kms: Kms) -> None:
    store = make(Source(kms.leaf()), World())
    assert store.current is None
    assert store.reason == "the test's source has not answered yet"
    with pytest.raises(IdentityUnavailable, match="no certificate yet: the test's source has not"):
        store.require()


async def test_the_first_snapshot_is_published_and_told(
    kms: Kms, caplog: pytest.LogCaptureFixture
) -> None:
    world, leaf = World(), kms.leaf(not_after=until(DAY))
    store = make(Source(leaf), world)
    seen: list[tuple[Snapshot, bool]] = []
    store.subscribe(lambda snapshot: seen.append((snapshot, store.current is snapshot)))
    waiting = asyncio.create_task(store.wait_loaded())
    async with running(store):
        await world.asleep()
        snapshot = await asyncio.wait_for(waiting, DEADLINE)
    assert store.current is store.require() is snapshot
    assert (snapshot.generation, snapshot.app_id, store.reason) == (1, APP_A, None)
    assert (store.fetched, store.failed) == (1, 0)
    assert seen == [(snapshot, True)]
    assert events(caplog) == ["identity_loaded"]
    told = fields(caplog, "identity_loaded")
    assert (told["app_id"], told["generation"]) == (APP_A, 1)
    assert told["not_after"] == "2023-11-15T22:13:20Z"
    assert "PRIVATE" not in str(caplog.records)


async def test_it_asks_again_after_failures_more_and_more_slowly(
    kms: Kms, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    failures = [SourceError(f"no answer {n}") for n in range(8)]
    store = make(Source(*failures, kms.leaf()), world)
    async with running(store):
        pauses = [await world.asleep()]
        while store.current is None:
            assert store.reason == f"no answer {len(pauses) - 1}"
            pauses.append(await world.pass_on(pauses[-1]))
    assert pauses[:-1] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert store.reason is None
    assert (store.fetched, store.failed) == (1, 8)
    assert events(caplog) == [*["identity_fetch_failed"] * 8, "identity_loaded"]
    assert fields(caplog, "identity_fetch_failed") == {
        "reason": "no answer 0",
        "retry_seconds": 1.0,
        "source": "the test's source",
    }


async def test_the_pauses_after_failures_are_jittered() -> None:
    world = World()
    world.random = 0.5
    async with running(make(Source(SourceError("no")), world)):
        pauses = [await world.asleep()]
        for _ in range(5):
            pauses.append(await world.pass_on(pauses[-1]))
    assert pauses == pytest.approx([0.9, 1.8, 3.6, 7.2, 14.4, 27.0])


@pytest.mark.parametrize(("random", "share"), [(0.0, 1.0), (1.0, 0.9)])
async def test_it_is_renewed_at_two_thirds_with_jitter(
    kms: Kms, random: float, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    world.random = random
    source = Source(kms.leaf(not_after=until(DAY)), kms.leaf())
    store = make(source, world, lifetime=900.0)
    async with running(store):
        step = await world.asleep()
        first = store.require()
        due = START + 600 * share
        assert first.renew_at == pytest.approx(due)
        assert step == 30.0, "the clock is to be looked at again soon"
        while world.now + step < due - 0.001:
            step = await world.pass_on(step)
            assert store.current is first
        await world.pass_on(step)
        second = store.require()
    assert source.fetches == 2
    assert (first.generation, second.generation) == (1, 2)
    assert second.client_context is not first.client_context
    assert second.peers is not first.peers
    assert events(caplog) == ["identity_loaded", "identity_renewed"]


async def test_a_leaf_with_little_left_is_renewed_at_two_thirds_of_that(kms: Kms) -> None:
    world = World()
    store = make(Source(kms.leaf(not_after=until(90))), world)
    async with running(store):
        await world.asleep()
        assert store.require().renew_at == START + 60


async def test_a_leaf_about_to_expire_is_not_asked_for_in_a_tight_loop(kms: Kms) -> None:
    world = World()
    store = make(Source(kms.leaf(not_after=until(1))), world)
    async with running(store):
        assert await world.asleep() == 1.0


async def test_the_last_good_one_serves_until_it_expires(
    kms: Kms, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    source = Source(kms.leaf(not_after=until(300)), SourceError("agent gone"))
    store = make(source, world)
    async with running(store):
        await world.let_pass(START + 200, await world.asleep())
        first = store.require()
        assert store.reason == "agent gone"
        step = 1.0
        while world.now + step < START + 300:
            step = await world.pass_on(step)
            assert store.require() is first
        assert "identity_expired" not in events(caplog)
        await world.pass_on(step)
        assert store.current is first
        with pytest.raises(IdentityUnavailable) as error:
            store.require()
        assert error.value.detail == (
            "this mesh's own certificate expired at 2023-11-14T22:18:20Z: agent gone"
        )
        await world.pass_on(30.0)
        assert events(caplog).count("identity_expired") == 1
        source.gives = [kms.leaf()]
        await world.pass_on(30.0)
        assert store.require().generation == 2
        assert store.reason is None


async def test_an_expiry_without_a_failure_is_told_too(kms: Kms) -> None:
    world = World()
    store = make(Source(kms.leaf(not_after=until(100))), world)
    async with running(store):
        await world.asleep()
        world.now += 100
        with pytest.raises(IdentityUnavailable, match="its renewal is under way"):
            store.require()


async def test_credentials_that_do_not_hold_are_not_published(kms: Kms) -> None:
    world = World()
    good = kms.leaf(not_after=until(90))
    store = make(Source(good, kms.leaf(APP_B, issuer=kms.app_ca(APP_A))), world)
    async with running(store):
        step = await world.asleep()
        first = store.require()
        await world.let_pass(START + 60, step)
        assert store.require() is first
        assert store.reason is not None
        assert "chain rule 3" in store.reason


async def test_a_mistake_in_the_source_does_not_end_the_renewals(kms: Kms) -> None:
    world = World()
    store = make(Source(RuntimeError("oops"), kms.leaf()), world)
    async with running(store):
        await world.asleep()
        assert store.reason == "RuntimeError: oops"
        await world.pass_on(1.0)
        assert store.require().generation == 1


async def test_a_mistake_in_a_subscriber_does_not_end_the_renewals(
    kms: Kms, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    store = make(Source(kms.leaf()), world)
    called: list[int] = []

    def mistaken(_: Snapshot) -> None:
        raise RuntimeError("oops")

    store.subscribe(mistaken)
    store.subscribe(lambda snapshot: called.append(snapshot.generation))
    async with running(store):
        await world.asleep()
    assert called == [1]
    assert "identity_subscriber_failed" in events(caplog)


async def test_another_root_key_is_refused_loudly_and_the_old_identity_stays(
    kms: Kms, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    store = make(Source(kms.leaf(not_after=until(90)), Kms().leaf()), world)
    async with running(store):
        step = await world.asleep()
        first = store.require()
        await world.let_pass(START + 60, step)
        assert store.require() is first
    assert store.reason is not None
    assert "under another KMS root key, which is refused" in store.reason
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.getMessage() == "kms_root_changed"


async def test_a_root_made_again_with_the_same_key_is_taken(kms: Kms) -> None:
    again = Kms(
        issue(
            None,
            "Dstack KMS CA",
            [extension.value for extension in kms.root.cert.extensions],
            key=kms.root.key,
        )
    )
    assert again.root.cert != kms.root.cert
    world = World()
    store = make(Source(kms.leaf(not_after=until(90)), again.leaf()), world)
    async with running(store):
        await world.let_pass(START + 60, await world.asleep())
        assert store.require().generation == 2


async def test_a_clock_that_jumps_ahead_makes_the_renewal_due(kms: Kms) -> None:
    world = World()
    store = make(Source(kms.leaf(), kms.leaf()), world)
    async with running(store):
        await world.asleep()
        await world.pass_on(20 * 3600.0)
        assert store.require().generation == 2


@pytest.mark.parametrize(("back", "generation"), [(-30.0, 1), (-30 * DAY, 2)])
async def test_a_clock_that_is_set_back_makes_it_due_too(
    kms: Kms, back: float, generation: int
) -> None:
    world = World()
    store = make(Source(kms.leaf(), kms.leaf()), world)
    async with running(store):
        await world.asleep()
        await world.pass_on(back)
        assert store.require().generation == generation


class Files:
    """Writes credentials where a `FileSource` reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = FileSource(folder / "cert", folder / "key", folder / "ca")

    def write(self, issued: Issued, key_of: Issued | None = None) -> None:
        (self.folder / "cert").write_bytes(b"".join(issued.chain_pem))
        (self.folder / "key").write_bytes((key_of or issued).key_pem)
        (self.folder / "ca").write_bytes(issued.chain_pem[-1])


async def test_files_are_read_again_when_they_change_and_only_then(
    kms: Kms, tmp_path: Path
) -> None:
    world, files = World(), Files(tmp_path)
    files.write(kms.leaf(not_after=until(100)))
    store = make(files.source, world)
    async with running(store):
        assert await world.asleep() == 1.0
        first = store.require()
        for _ in range(80):
            assert await world.pass_on(1.0) == 1.0
        assert store.current is first, "past 2/3, but there is nothing new to read"
        files.write(kms.leaf())
        await world.pass_on(1.0)
        assert store.require().generation == 2


async def test_files_replaced_half_way_keep_the_old_identity_until_they_fit(
    kms: Kms, tmp_path: Path
) -> None:
    world, files = World(), Files(tmp_path)
    old, new = kms.leaf(), kms.leaf()
    files.write(old)
    store = make(files.source, world)
    async with running(store):
        await world.asleep()
        first = store.require()
        files.write(new, key_of=old)
        await world.pass_on(1.0)
        assert store.current is first
        assert store.reason == "our private key is not the one of our certificate"
        for _ in range(5):  # into a longer pause between attempts
            await world.pass_on(1.0)
        assert store.current is first
        files.write(new)
        await world.pass_on(1.0)
        assert store.require().generation == 2


async def test_it_runs_on_the_real_clock_too(kms: Kms) -> None:
    store = IdentityStore(Source(kms.leaf()), lifetime=DAY, min_version=ssl.TLSVersion.TLSv1_3)
    async with running(store):
        snapshot = await asyncio.wait_for(store.wait_loaded(), DEADLINE)
    assert snapshot.app_id == APP_A


# Another source, on a reload.


async def test_what_is_prepared_is_not_published(kms: Kms) -> None:
    world, source = World(), Source(kms.leaf())
    store = make(source, world)
    async with running(store):
        await world.asleep()
        first = store.require()
        prepared = await store.prepare(Source(kms.leaf()))
        assert store.current is first
        assert prepared.app_id == APP_A
        with pytest.raises(SourceError, match="nothing there"):
            await store.prepare(Source(SourceError("nothing there")))
        assert (store.current, store.reason, store.failed) == (first, None, 0)


async def test_a_switch_publishes_at_once_and_renews_from_the_new_source(kms: Kms) -> None:
    world, old, new = World(), Source(kms.leaf()), Source(kms.leaf())
    store = make(old, world)
    seen: list[Snapshot] = []
    store.subscribe(seen.append)
    async with running(store):
        step = await world.asleep()
        store.switch(new, await store.prepare(new))
        assert store.require().generation == 2
        assert [one.generation for one in seen] == [1, 2]
        due = store.require().renew_at
        await world.let_pass(due - 1, step)
        assert (old.fetches, new.fetches) == (1, 1)
        await world.pass_on(1)
        assert (old.fetches, new.fetches) == (1, 2)
        assert store.require().generation == 3


async def test_a_switch_to_files_looks_at_them_from_then_on(kms: Kms, tmp_path: Path) -> None:
    world, files = World(), Files(tmp_path)
    files.write(kms.leaf())
    store = make(Source(kms.leaf()), world)
    assert not store.source_changed(), "an agent is not asked for that"
    async with running(store):
        await world.asleep()
        store.switch(files.source, await store.prepare(files.source))
        assert not store.source_changed()
        await world.pass_on(1.0)
        assert store.require().generation == 2
        files.write(kms.leaf())
        assert store.source_changed()
        await world.pass_on(1.0)
        assert store.require().generation == 3


async def test_another_root_key_is_refused_from_a_new_source_too(kms: Kms) -> None:
    world = World()
    store = make(Source(kms.leaf()), world)
    async with running(store):
        await world.asleep()
        with pytest.raises(SourceError, match="another KMS root key"):
            await store.prepare(Source(Kms().leaf()))
        assert store.require().generation == 1


async def test_an_answer_of_the_source_before_comes_too_late(kms: Kms) -> None:
    class Slow(Source):
        def __init__(self, *gives: Issued | Exception) -> None:
            super().__init__(*gives)
            self.asked, self.go = asyncio.Event(), asyncio.Event()

        async def fetch(self) -> Credentials:
            self.asked.set()
            await self.go.wait()
            return await super().fetch()

    world, slow, new = World(), Slow(kms.leaf()), Source(kms.leaf())
    store = make(slow, world)
    async with running(store):
        await asyncio.wait_for(slow.asked.wait(), DEADLINE)
        store.switch(new, await store.prepare(new))
        mine = store.require()
        slow.go.set()
        await world.asleep()
        assert store.require() is mine
        assert store.fetched == 1

"""SIGHUP's work, with fakes: all or nothing, and what is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dstack_mesh.identity.source import SourceError
from dstack_mesh.ops import logs
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.decide import Policy
from dstack_mesh.reload import Part, Reloader, identity_part, log_part, policy_part
from dstack_mesh.settings.errors import SettingsError
from dstack_mesh.settings.load import Loaded, load_settings
from dstack_mesh.settings.rules import TABLES
from dstack_mesh.settings.schema import SCHEMA
from dstack_mesh.settings.tree import Settings

pytestmark = pytest.mark.usefixtures("logging_as_before")

APP = "3f" * 20


class Supervisor:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.is_over = asyncio.Event()

    def reloading(self) -> None:
        self.told.append("reloading")

    def reloaded(self) -> None:
        self.told.append("reloaded")
        self.is_over.set()


def deciding() -> Current:
    return Current(Policy(Allow.parse("any")))


def allows(current: Current) -> Allow:
    return current.policy.allow


class File:
    """A settings file that a test rewrites."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("")

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def load(self) -> Loaded:
        environ = {"DSTACK_AGENT_ADDRESS": "unix:/a", "MESH_DRAIN_TIMEOUT": "9s"}
        return load_settings({}, environ, self.path)


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "mesh.toml")


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, object]]]:
    found = [(one.getMessage(), one.fields) for one in caplog.records]  # type: ignore[attr-defined]
    caplog.clear()
    return found


def failing(error: Exception, keys: tuple[str, ...] = ()) -> Part:
    async def prepare(before: Settings, now: Settings) -> Callable[[], None]:
        raise error

    return Part(keys, prepare)


async def test_the_allow_list_changes(file: File, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dstack_mesh")
    one = deciding()
    reloader = Reloader(file.load(), [policy_part(one)], Supervisor())
    file.write(f"[inbound]\nallow = ['{APP}']")
    assert await reloader.reload()
    assert allows(one) == Allow.parse(APP)
    assert told(caplog) == [("settings_reloaded", {"changed": ["inbound.allow"]})]
    assert await reloader.reload()
    assert told(caplog) == [("settings_reloaded", {"changed": []})]
    file.write("")
    assert await reloader.reload()
    assert allows(one) == Allow.parse("any")


async def test_rules_routes_and_the_mode_change(
    file: File, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dstack_mesh")
    one = deciding()
    file.write("[inbound]\nbackend = 'b:1'")
    reloader = Reloader(file.load(), [policy_part(one)], Supervisor())
    file.write(
        "[inbound]\nbackend = 'b:1'\npolicy_mode = 'audit'\n"
        "[[inbound.rule]]\naction = 'allow'\nmethods = ['GET']\n"
        "[[inbound.route]]\npath = '/api/*'\nbackend = 'c:2'\n"
    )
    assert await reloader.reload()
    assert one.policy.audit
    assert not one.policy.asks_who_only
    assert [str(backend) for backend in one.routes.backends] == ["c:2"]
    changed = {"inbound.policy_mode", "inbound.rule", "inbound.route"}
    *_, (_, fields) = told(caplog)
    assert set(fields["changed"]) == changed  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[inbound]\nallow = 'nobody'", "inbound.allow in "),
        ("[inbound]\nallow = ['self']\nlisten = 'x'", "inbound.listen in "),
        ("[inbound", "is not valid TOML"),
    ],
)
async def test_an_error_anywhere_keeps_everything(
    file: File, caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    one = deciding()
    reloader = Reloader(file.load(), [policy_part(one)], Supervisor())
    file.write(text)
    assert not await reloader.reload()
    assert allows(one) == Allow.parse("any")
    ((name, fields),) = told(caplog)
    assert name == "settings_reload_failed"
    assert reason in str(fields["reason"])
    file.write("[inbound]\nallow = 'self'")
    assert await reloader.reload(), "a mistake is no obstacle to the next one"
    assert allows(one) == Allow.parse("self")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SourceError("cert.pem has no PEM certificate"), "cert.pem has no PEM certificate"),
        (SettingsError("x is y"), "x is y"),
        (RuntimeError("a mistake of ours"), "RuntimeError: a mistake of ours"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
async def test_a_part_that_cannot_keeps_the_others_from_changing(
    file: File, caplog: pytest.LogCaptureFixture, error: Exception, reason: str, last: bool
) -> None:
    one = deciding()
    parts = [policy_part(one), failing(error)]
    reloader = Reloader(file.load(), parts if last else parts[::-1], Supervisor())
    file.write("[inbound]\nallow = 'self'")
    assert not await reloader.reload()
    assert allows(one) == Allow.parse("any")
    ((_, fields),) = told(caplog)
    assert fields["reason"] == reason


async def test_what_needs_a_restart_is_named_each_time(
    file: File, caplog: pytest.LogCaptureFixture
) -> None:
    one = deciding()
    reloader = Reloader(file.load(), [policy_part(one)], Supervisor())
    file.write("max_connections = 5\n[inbound]\nallow = 'self'\nbackend = 'b:1'")
    for _ in range(2):
        assert await reloader.reload()
        (name, fields), *_ = told(caplog)
        assert name == "settings_need_restart"
        assert fields["keys"] == ["inbound.backend", "max_connections"]
    assert allows(one) == Allow.parse("self"), "the others count all the same"
    file.write("drain_timeout = '1s'")
    assert await reloader.reload()
    assert told(caplog) == [], "the environment beats the file, as at the start"


async def test_new_warnings_are_told_once(file: File, caplog: pytest.LogCaptureFixture) -> None:
    reloader = Reloader(file.load(), [], Supervisor())
    file.write("[inbound]\nmode = 'nginx'\nauth_listen = '0.0.0.0:1'")
    assert await reloader.reload()
    assert [name for name, _ in told(caplog)] == ["settings_warning", "settings_need_restart"]
    assert await reloader.reload()
    assert [name for name, _ in told(caplog)] == ["settings_need_restart"]


async def test_log_level_and_format(file: File, capfd: pytest.CaptureFixture[str]) -> None:
    logs.setup("json", "error")
    modes: list[str] = []
    reloader = Reloader(file.load(), [log_part(modes.append)], Supervisor())
    file.write("[log]\nlevel = 'debug'\nformat = 'text'\naccess = 'errors'")
    assert await reloader.reload()
    assert modes == ["errors"]
    logging.getLogger("dstack_mesh.x").debug("seen")
    out = capfd.readouterr().err.splitlines()
    assert "INFO    settings_reloaded" in out[0]
    assert "DEBUG   log_message message=seen" in out[1]


class Store:
    def __init__(self) -> None:
        self.changed = False
        self.asked: list[object] = []
        self.switched: list[object] = []
        self.error: SourceError | None = None

    def source_changed(self) -> bool:
        return self.changed

    async def prepare(self, source: object) -> object:
        self.asked.append(source)
        if self.error is not None:
            raise self.error
        return ("snapshot of", source)

    def switch(self, source: object, snapshot: object) -> None:
        self.switched.append((source, snapshot))


def _tls(directory: Path) -> str:
    for name in ("cert", "key", "ca"):
        (directory / name).touch()
    lines = [f"{name}_file = '{directory}/{name}'" for name in ("cert", "key", "ca")]
    return "\n".join(["[tls]", *lines])


async def test_the_identity_changes_with_its_files(file: File, tmp_path: Path) -> None:
    store = Store()
    part = identity_part(store, lambda tls: ("source", tls.cert_file))  # type: ignore[arg-type, return-value]
    reloader = Reloader(file.load(), [part], Supervisor())
    assert await reloader.reload()
    assert store.asked == [], "the agent is left alone"
    file.write(_tls(tmp_path))
    source = ("source", f"{tmp_path}/cert")
    assert await reloader.reload()
    assert store.switched == [(source, ("snapshot of", source))]
    assert await reloader.reload()
    assert len(store.asked) == 1, "the same files, as they were"
    store.changed = True
    assert await reloader.reload()
    assert len(store.switched) == 2
    store.error = SourceError("no key")
    assert not await reloader.reload()
    assert len(store.switched) == 2

    store.error = None
    reloader = Reloader(file.load(), [part, failing(SourceError("no"))], Supervisor())
    assert not await reloader.reload()
    assert (len(store.asked), len(store.switched)) == (4, 2), "prepared, and not put into effect"


async def test_every_setting_that_is_said_to_be_re_read_has_its_part() -> None:
    parts = [policy_part(deciding()), identity_part(None, None), log_part(print)]  # type: ignore[arg-type]
    keys = [key for part in parts for key in part.keys]
    said = [one.key for one in SCHEMA if one.reloadable]
    assert sorted(keys) == sorted([*said, *TABLES])


async def test_asked_while_at_it_it_is_done_once_more(file: File) -> None:
    began: asyncio.Queue[None] = asyncio.Queue()
    go = asyncio.Semaphore(0)

    async def prepare(before: Settings, now: Settings) -> Callable[[], None]:
        began.put_nowait(None)
        await go.acquire()
        return lambda: None

    supervisor = Supervisor()
    reloader = Reloader(file.load(), [Part((), prepare)], supervisor)
    task = asyncio.create_task(reloader.run())

    async def within(what: Awaitable[object]) -> None:
        await asyncio.wait_for(what, 10)

    try:
        reloader.ask()
        await within(began.get())
        assert supervisor.told == ["reloading"]
        for _ in range(3):
            reloader.ask()
        go.release()
        await within(began.get())
        supervisor.is_over.clear()
        go.release()
        await within(supervisor.is_over.wait())
        assert supervisor.told == ["reloading", "reloaded"] * 2
        assert began.empty()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_systemd_hears_the_end_of_a_failed_reload_too(file: File) -> None:
    supervisor = Supervisor()
    reloader = Reloader(file.load(), [failing(SourceError("no"))], supervisor)
    task = asyncio.create_task(reloader.run())
    reloader.ask()
    await asyncio.wait_for(supervisor.is_over.wait(), 10)
    assert supervisor.told == ["reloading", "reloaded"]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

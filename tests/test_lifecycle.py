from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstack_mesh import lifecycle
from dstack_mesh.lifecycle import Signals, remove_ready_file, write_ready_file

BOUND = {
    "outbound": "127.0.0.1:8091",
    "inbound": "0.0.0.0:8443",
    "auth": None,
    "admin": "127.0.0.1:8093",
}


# The ready file.


def test_the_ready_file_is_the_contracts_one_line(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    write_ready_file(path, BOUND)
    assert path.read_text() == (
        '{"outbound":"127.0.0.1:8091","inbound":"0.0.0.0:8443","auth":null,'
        f'"admin":"127.0.0.1:8093","pid":{os.getpid()}}}\n'
    )


def test_a_ready_file_is_replaced_and_never_written_into(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text("an older one")
    with path.open() as reader:
        write_ready_file(path, BOUND)
        assert reader.read() == "an older one"
    assert json.loads(path.read_text()) == {**BOUND, "pid": os.getpid()}
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_appears_only_with_all_of_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ready.json"
    seen = []
    really_replace = Path.replace

    def replace(draft: Path, target: Path) -> Path:
        seen.append((path.exists(), draft.parent, json.loads(draft.read_text())))
        return really_replace(draft, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_ready_file(path, BOUND)
    assert seen == [(False, tmp_path, {**BOUND, "pid": os.getpid()})]


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_ready_file(tmp_path / "absent" / "ready.json", BOUND)


def test_a_draft_that_cannot_become_the_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_ready_file(path, BOUND)
    assert list(tmp_path.iterdir()) == [path]


def test_the_ready_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    write_ready_file(path, BOUND)
    remove_ready_file(path)
    assert not path.exists()


def test_a_ready_file_that_is_gone_or_cannot_go_is_no_error(tmp_path: Path) -> None:
    remove_ready_file(tmp_path / "ready.json")
    remove_ready_file(tmp_path / "absent" / "ready.json")
    remove_ready_file(tmp_path)
    assert tmp_path.is_dir()


# Signals.


@contextmanager
def _signals() -> Iterator[Signals]:
    loop = asyncio.get_running_loop()
    try:
        yield Signals(loop)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_the_first_signal_asks_for_an_orderly_end(
    number: signal.Signals, status: int
) -> None:
    with _signals() as signals:
        waiting = asyncio.ensure_future(signals.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        os.kill(os.getpid(), number)
        async with asyncio.timeout(10):
            await waiting
        assert signals.exit_status == status


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGTERM, 143),
    ],
)
async def test_a_second_signal_ends_the_process_at_once(
    first: signal.Signals,
    second: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(lifecycle.os, "_exit", ended.set_result)
    with _signals() as signals:
        async with asyncio.timeout(10):
            os.kill(os.getpid(), first)
            await signals.wait()
            assert not ended.done()
            os.kill(os.getpid(), second)
            assert await ended == status


async def test_an_end_from_inside_has_a_status_of_its_own() -> None:
    with _signals() as signals:
        signals.end(1)
        async with asyncio.timeout(10):
            await signals.wait()
        assert signals.exit_status == 1

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_mesh.demo import client
from dstack_mesh.demo import stage as module
from dstack_mesh.demo.sidecar import Sidecar
from dstack_mesh.demo.stage import Stage, StageError


@pytest.fixture
def temporary(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Where stages put their directories; short, as pytest's own names would not be."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    path = Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    shutil.rmtree(path)


def left(temporary: Path) -> list[Path]:
    return list(temporary.iterdir())


def gone(*pids: int) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_both_sidecars_are_processes_and_end_with_it(temporary: Path) -> None:
    async with Stage() as stage:
        pids = [sidecar.pid for sidecar in stage.sidecars]
        assert len({*pids, os.getpid()}) == 3
        for sidecar in stage.sidecars:
            assert (await client.get(sidecar.admin, "/readyz")).status == 200
        assert stage.fallen() == ""
        assert stage.who(stage.caller_app.app_id).endswith(", shop")
        assert stage.who(stage.other_app_id) == "3ac0dd7a…74eb"
    assert gone(*pids)
    assert left(temporary) == []


async def test_sidecar_that_ends_is_told(temporary: Path) -> None:
    async with Stage() as stage:
        os.kill(stage.target.pid, signal.SIGKILL)
        assert (await stage.wait_fallen()).startswith("billing's sidecar ended by signal 9; it")
        assert stage.fallen() == "billing's sidecar ended by signal 9"
    assert left(temporary) == []


async def test_failure_on_the_way_leaves_nothing_behind(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Sidecar] = []
    start = Sidecar.start

    async def fail_second(self: Sidecar) -> None:
        started.append(self)
        if len(started) == 1:
            await start(self)
        else:
            await start(self, ("/bin/sh", "-c", "echo no more ports; exit 1"))

    monkeypatch.setattr(Sidecar, "start", fail_second)
    with pytest.raises(StageError, match="billing's sidecar ended with 1; it said last: no more"):
        async with Stage():
            raise AssertionError
    assert gone(*(sidecar.pid for sidecar in started))
    assert left(temporary) == []


async def test_ports_that_cannot_be_had_are_told(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> int:
        raise OSError("no TCP port is free")

    monkeypatch.setattr("dstack_mesh.sim.world.common_port", none)
    with pytest.raises(StageError, match="no TCP port is free"):
        async with Stage():
            raise AssertionError
    assert left(temporary) == []


async def test_long_path_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / ("x" * 80)))
    with pytest.raises(StageError, match="too long for unix sockets in it; set TMPDIR to a short"):
        async with Stage():
            raise AssertionError


async def test_directory_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", "/nowhere")
    with pytest.raises(StageError, match="/nowhere"):
        async with Stage():
            raise AssertionError

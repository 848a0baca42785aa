"""The process's side, with stand-ins for the sidecar's program; the real one is in test_stage."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.demo import sidecar
from dstack_mesh.demo.sidecar import Sidecar, SidecarError

IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " print('up', flush=True); time.sleep(60)"
)


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Sidecar]:
    found = Sidecar("shop", {"MESH_OWN": "1"}, tmp_path)
    yield found
    await found.stop()


async def test_end_before_it_is_ready_is_told_with_its_last_words(one: Sidecar) -> None:
    await one.start(program("print('first'); print('cannot listen on 1.2.3.4'); exit(3)"))
    with pytest.raises(SidecarError) as error:
        await one.wait_ready()
    assert str(error.value) == (
        "shop's sidecar ended with 3; it said last: cannot listen on 1.2.3.4"
    )
    assert one.describe_end(with_log=False) == "shop's sidecar ended with 3"


async def test_sidecar_that_never_gets_ready_is_told(
    one: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "START_SECONDS", 0.05)
    await one.start(program("import time; time.sleep(60)"))
    with pytest.raises(SidecarError, match=r"not ready after 0\.05 s"):
        await one.wait_ready()


async def test_program_that_is_not_there_is_told(one: Sidecar) -> None:
    with pytest.raises(SidecarError, match="shop's sidecar cannot be started: "):
        await one.start(("/nowhere/at/all",))
    assert (one.pid, one.ended) == (0, None)
    await one.wait_ended()


async def test_only_its_own_settings_reach_it(
    one: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_GATEWAY", "another.mesh")
    monkeypatch.setenv("DSTACK_AGENT_ADDRESS", "unix:/other")
    monkeypatch.setenv("UNRELATED", "kept")
    code = "import os; print(sorted(k for k in os.environ if k[:4] in ('MESH', 'DSTA', 'UNRE')))"
    await one.start(program(code))
    await one.wait_ended()
    assert one.log.read_text() == "['MESH_OWN', 'UNRELATED']\n"


async def test_stop_ends_even_what_does_not_want_to(
    one: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "_STOP_SECONDS", 0.05)
    await one.start(program(IGNORES_SIGTERM))
    while not one.log.read_text():
        await sidecar.asyncio.sleep(0.01)
    await one.stop()
    assert one.ended == -9
    assert one.describe_end() == "shop's sidecar ended by signal 9; it said last: up"
    with pytest.raises(ProcessLookupError):
        os.kill(one.pid, 0)
    await one.stop()  # there is nothing left to stop


async def test_memory_is_the_processs(one: Sidecar) -> None:
    code = "import time; x = bytes(30_000_000); y = b'x' * 30_000_000; print(1, flush=True)"
    await one.start(program(f"{code}; del y; time.sleep(60)"))
    while not one.log.read_text():
        await sidecar.asyncio.sleep(0.01)
    memory = one.memory()
    assert 1_000_000 < memory.now <= memory.peak
    assert memory.peak > 30_000_000
    await one.stop()
    with pytest.raises(OSError, match=r"status"):
        one.memory()

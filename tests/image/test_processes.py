from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from tests.integration.harness import eventually

from dstack_mesh.image.processes import Child, described


async def start(script: str) -> Child:
    return await Child.start("it", ["bash", "-c", script], os.environ)


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (3, "exit status 3"), (-9, "killed by SIGKILL"), (-99, "by signal 99")],
)
def test_an_end_in_words(status: int, words: str) -> None:
    assert words in described(status)


async def test_an_end_is_told() -> None:
    assert await (await start("exit 7")).ended() == "exit status 7"


async def test_no_such_program() -> None:
    with pytest.raises(FileNotFoundError):
        await Child.start("it", ["/no/such/program"], {})


async def test_it_ends_by_the_first_signal() -> None:
    child = await start("trap 'exit 5' QUIT; echo; while :; do sleep 0.05; done")
    await asyncio.sleep(0)
    ending = asyncio.create_task(child.ended())
    while child.running:
        await child.end([signal.SIGQUIT], 5)
    assert (await ending) in ("exit status 5", "killed by SIGQUIT")


async def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = await start(f"trap '' QUIT TERM; touch {ready}; while :; do sleep 0.05; done")
    await eventually(ready.exists)
    await child.end([signal.SIGQUIT, signal.SIGTERM], 0.1)
    assert await child.ended() == "killed by SIGKILL"


async def test_signals_to_one_that_has_ended_do_nothing() -> None:
    child = await start("exit 0")
    await child.ended()
    child.signal(signal.SIGTERM)
    child.kill()
    await child.end([signal.SIGTERM], 5)
    assert not child.running

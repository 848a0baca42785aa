"""Faults that tests of others switch on."""

from __future__ import annotations

import time

from dstack_mesh.sim.faults import Faults
from dstack_mesh.sim.messages import Raw, Response


async def test_no_fault_unless_asked() -> None:
    assert await Faults().fault() is None


async def test_fail_next_fails_that_often() -> None:
    part = Faults()
    part.fail_next(2)
    found = [await part.fault() for _ in range(3)]
    assert [isinstance(answer, Response) for answer in found] == [True, True, False]


async def test_failing_lasts() -> None:
    part = Faults()
    part.failing = True
    assert isinstance(await part.fault(), Response)
    assert isinstance(await part.fault(), Response)
    part.failing = False
    assert await part.fault() is None


async def test_nonsense_and_delay() -> None:
    part = Faults()
    part.nonsense, part.delay = b"?", 0.05
    begun = time.monotonic()
    assert await part.fault() == Raw(b"?")
    assert time.monotonic() - begun >= 0.04

"""One thing that the demo tries: what, what is expected, and what happened."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from dstack_mesh.demo.stage import Stage

ACT_SECONDS = 60.0
"""After which an act has failed; each takes a fraction of a second where all is well."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened, as read from answers and counters, and whether it is what was expected."""

    ok: bool
    happened: str


@dataclass(frozen=True, slots=True)
class Act:
    """What is tried, in the words shown. `run` may raise anything: the act has failed then."""

    name: str
    """For scripts: snake_case."""

    tried: str
    expected: str
    run: Callable[[Stage], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class Result:
    """An act that was played."""

    act: Act
    outcome: Outcome
    seconds: float


async def play(act: Act, stage: Stage) -> Result:
    """Run an act; whatever it raises is its outcome, and so is a sidecar that ended meanwhile."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(ACT_SECONDS):
            outcome = await act.run(stage)
    except TimeoutError:
        outcome = Outcome(ok=False, happened=f"nothing within {ACT_SECONDS:g} s")
    except Exception as error:
        outcome = Outcome(ok=False, happened=f"{type(error).__name__}: {error}")
    if fallen := stage.fallen():
        outcome = Outcome(ok=False, happened=f"{outcome.happened}\n{fallen}")
    return Result(act, outcome, time.monotonic() - started)


def short(identifier: str) -> str:
    """Shorten an id of 40 hex digits for a table."""
    return f"{identifier[:8]}…{identifier[-4:]}" if len(identifier) == 40 else identifier

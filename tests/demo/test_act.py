from __future__ import annotations

import asyncio

import pytest

from dstack_mesh.demo import act
from dstack_mesh.demo.act import Act, Outcome, play, short


class Stage:
    """Stands in for a stage: only whether a sidecar has ended is asked of it."""

    def __init__(self, fallen: str = "") -> None:
        self._fallen = fallen

    def fallen(self) -> str:
        return self._fallen


def an_act(run) -> Act:  # type: ignore[no-untyped-def]
    return Act("an_act", "it is tried", "it works", run)


async def test_outcome_and_time_are_the_acts() -> None:
    async def run(_: object) -> Outcome:
        return Outcome(ok=True, happened="it worked")

    result = await play(an_act(run), Stage())
    assert (result.outcome, result.act.name) == (Outcome(True, "it worked"), "an_act")
    assert 0 <= result.seconds < 10


async def test_whatever_is_raised_is_a_failure() -> None:
    async def run(_: object) -> Outcome:
        raise ConnectionRefusedError("nobody there")

    result = await play(an_act(run), Stage())
    assert result.outcome == Outcome(False, "ConnectionRefusedError: nobody there")


async def test_sidecar_that_ended_spoils_a_good_outcome() -> None:
    async def run(_: object) -> Outcome:
        return Outcome(ok=True, happened="it worked")

    result = await play(an_act(run), Stage("shop's sidecar ended with 1"))
    assert result.outcome == Outcome(False, "it worked\nshop's sidecar ended with 1")


async def test_act_that_does_not_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(act, "ACT_SECONDS", 0.01)

    async def run(_: object) -> Outcome:
        await asyncio.Event().wait()
        raise AssertionError

    assert (await play(an_act(run), Stage())).outcome == Outcome(False, "nothing within 0.01 s")


def test_ids_are_shortened_and_nothing_else() -> None:
    assert short("0123456789" * 4) == "01234567…6789"
    assert short("nobody") == "nobody"

"""The demo from its beginning to its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from dstack_mesh.demo import refused, served
from dstack_mesh.demo.act import Act, Result, play
from dstack_mesh.demo.stage import Stage, StageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PARTS: Mapping[str, Sequence[Act]] = {
    "What the mesh carries": served.ACTS,
    "What it refuses": refused.ACTS,
}


class Display(Protocol):
    """Who is told what goes on, in this order."""

    def begin(self, stage: Stage) -> None:
        """Everything is up."""
        ...

    def playing(self, act: Act) -> None:
        """An act begins."""
        ...

    def played(self, result: Result) -> None:
        """It has ended."""
        ...

    def end(self, seconds: float) -> None:
        """All acts have been played, so many seconds after the start."""
        ...

    def keep(self, stage: Stage) -> None:
        """Everything stays up until a signal."""
        ...


class Demo:
    """All acts, one after the other, on a stage of their own; `run` it once."""

    def __init__(
        self, display: Display, *, keep: bool, parts: Mapping[str, Sequence[Act]] = PARTS
    ) -> None:
        self._display = display
        self._keep = keep
        self._acts = [act for acts in parts.values() for act in acts]
        self._results: list[Result] = []

    async def run(self) -> None:
        """Play; with `keep`, stay until cancelled.

        Raises `StageError` where the stage can't be set up, or a sidecar ends while it is kept.
        """
        started = time.monotonic()
        async with Stage() as stage:
            self._display.begin(stage)
            for act in self._acts:
                self._display.playing(act)
                result = await play(act, stage)
                self._results.append(result)
                self._display.played(result)
            self._display.end(time.monotonic() - started)
            if self._keep:
                self._display.keep(stage)
                raise StageError(await stage.wait_fallen())

    @property
    def complete(self) -> bool:
        """Whether every act has been played."""
        return len(self._results) == len(self._acts)

    @property
    def ok(self) -> bool:
        """Whether every act has been played and did what it should."""
        return self.complete and all(result.outcome.ok for result in self._results)


def suggestions(stage: Stage) -> list[tuple[str, str]]:
    """Give what to try on a mesh that was kept: what it shows, and the line to type."""
    caller, target = stage.caller, stage.target
    call = f"http://{caller.outbound}"
    return [
        (
            f"{target.name}'s app-id, from its own sidecar",
            f"APP_ID=$(curl -s http://{target.outbound}/info | jq -r .app_id)",
        ),
        (
            f"{caller.name} calls {target.name}; the answer is what the backend saw",
            f'curl -s -H "x-dstack-target-app: $APP_ID" {call}/echo | jq',
        ),
        (
            "events, as they are sent",
            f'curl -sN -H "x-dstack-target-app: $APP_ID" "{call}/events?n=10&seconds=0.5"',
        ),
        (
            "the gateway leads to another app than the one asked for",
            f"curl -i -H 'x-dstack-target-app: {stage.other_app_id}' {call}/",
        ),
        ("whether the mesh is ready, and why", f"curl -s http://{caller.admin}/readyz"),
        ("what it has done so far", f"curl -s http://{caller.admin}/metrics"),
        ("what its sidecar logs", f"tail -f {caller.log}"),
    ]

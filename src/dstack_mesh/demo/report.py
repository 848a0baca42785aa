"""The demo for scripts: one JSON object when it has ended."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dstack_mesh.demo.play import suggestions

if TYPE_CHECKING:
    from collections.abc import Callable

    from dstack_mesh.demo.act import Act, Result
    from dstack_mesh.demo.stage import Stage


class JsonDisplay:
    """Hands one line of JSON to `write`; see `play.Display`."""

    def __init__(self, write: Callable[[str], object], *, keep: bool) -> None:
        self._write = write
        self._keep = keep
        self._results: list[Result] = []
        self._stage: dict[str, object] = {}

    def begin(self, stage: Stage) -> None:
        """Note who plays."""
        self._stage["apps"] = {
            app.name: {
                "app_id": app.app_id,
                "outbound": sidecar.outbound,
                "inbound": app.env["MESH_INBOUND_LISTEN"],
                "admin": sidecar.admin,
                "pid": sidecar.pid,
            }
            for app, sidecar in (
                (stage.caller_app, stage.caller),
                (stage.target_app, stage.target),
            )
        }
        if self._keep:
            self._stage["try"] = [line for _, line in suggestions(stage)]

    def playing(self, act: Act) -> None:
        """Nothing: only results are told."""

    def played(self, result: Result) -> None:
        """Note an outcome."""
        self._results.append(result)

    def end(self, seconds: float) -> None:
        """Write it all."""
        acts = [
            {
                "name": result.act.name,
                "tried": result.act.tried,
                "expected": result.act.expected,
                "happened": result.outcome.happened,
                "ok": result.outcome.ok,
                "seconds": round(result.seconds, 3),
            }
            for result in self._results
        ]
        ok = all(result.outcome.ok for result in self._results)
        told = {"ok": ok, "seconds": round(seconds, 3), "acts": acts, **self._stage}
        self._write(json.dumps(told, ensure_ascii=False))

    def keep(self, stage: Stage) -> None:
        """Nothing more: the lines to try are in the object."""

"""Faults for a mesh, to see that the targets' oracles find them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
import pytest
from fuzz.targets import TARGETS

from dstack_mesh.wire import request


def fails(name: str) -> None:
    """Have the target's own seeds, with which it holds otherwise, find the fault put in."""
    run, seeds = TARGETS[name].load()

    def play() -> None:
        for data in seeds:
            run(data)

    with pytest.raises((AssertionError, h11.ProtocolError)) as found:
        play()
    judge = Path(str(found.traceback[-1].path))
    assert judge.parent.name in ("fuzz", "h11"), f"it was {judge} that failed"


def replaced(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, make: Callable[[Any], Any]
) -> None:
    monkeypatch.setattr(where, name, make(getattr(where, name)))


Patch = pytest.MonkeyPatch


def passing_on(monkeypatch: Patch, change: Callable[[bytes], bytes]) -> None:
    """Change what of a request's field lines goes on."""

    def changed(real: Any) -> Any:
        def parse(*given: Any) -> Any:
            parsed = real(*given)
            parsed.forwarded = change(parsed.forwarded)
            return parsed

        return parse

    replaced(monkeypatch, request, "parse_request_fields", changed)

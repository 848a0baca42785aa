"""How long and how often the parts measure, and what each of them gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.race import Row


@dataclass(frozen=True)
class Plan:
    """Given to every part."""

    short: bool = False
    rounds: int = 5
    rate: int = 5_000
    """Requests per second where latency is measured; less where a subject can't do much more."""

    idle: int = 10_000
    """Idle connections where memory is measured."""

    def seconds(self, full: float) -> float:
        """Give how long one turn lasts that takes `full` seconds in a complete run."""
        return min(full, 0.25) if self.short else full


@dataclass
class Found:
    """What a part found."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plain: dict[str, Any] = field(default_factory=dict)
    """What fits no row, by what a table calls it."""


@dataclass(frozen=True)
class Part:
    """One part of the benchmark."""

    name: str
    about: str
    run: Callable[[Plan], Found]
    tools: tuple[str, ...] = ()

"""What a check found, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Result:
    """One line: what was looked at, what was found, and where that is not good, what to do."""

    name: str
    """A short statement that holds where all is well: `the guest agent answers`."""

    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """The results on one subject."""

    name: str
    results: tuple[Result, ...]


def ok(name: str, detail: str) -> Result:
    """Give a result that is good."""
    return Result(name, "ok", detail)


def warning(name: str, detail: str, remedy: str) -> Result:
    """Give a result that works but may not be meant."""
    return Result(name, "warning", detail, remedy)


def failed(name: str, detail: str, remedy: str) -> Result:
    """Give a result that is not good; `remedy` says what to do."""
    return Result(name, "failed", detail, remedy)


def skipped(name: str, detail: str) -> Result:
    """Give a result of what could not be looked at, or need not be; `detail` says why."""
    return Result(name, "skipped", detail)


def all_well(groups: Sequence[Group]) -> bool:
    """Tell whether nothing failed; warnings are no failures."""
    return not any(one.status == "failed" for group in groups for one in group.results)

"""Metrics as plain data: what a worker process hands over, how two of it add up, and the text.

A family is all samples of one metric. What several processes counted is merged sample by sample,
in the way that the family names; the Prometheus text is made of what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

NAMESPACE = "dstack_mesh_"

Kind = Literal["counter", "gauge", "histogram"]
Merge = Literal["sum", "max", "min", "last"]

_MERGE: dict[Merge, Callable[[float, float], float]] = {
    "sum": lambda one, other: one + other,
    "max": max,
    "min": min,
    "last": lambda one, other: other,
}


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One number. `suffix` is what a histogram's parts have behind the metric's name."""

    suffix: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, frozen=True):
    """One metric, its name without the namespace."""

    name: str
    kind: Kind
    help: str
    samples: list[Sample]
    merge: Merge = "sum"


def merge_families(dumps: Sequence[Iterable[Family]]) -> list[Family]:
    """Merge what several processes counted; families and samples keep the order of the first."""
    found: dict[str, Family] = {}
    for dump in dumps:
        for family in dump:
            known = found.get(family.name)
            found[family.name] = family if known is None else _merged(known, family)
    return list(found.values())


def _merged(one: Family, other: Family) -> Family:
    merge = _MERGE[one.merge]
    samples = {_key(sample): sample for sample in one.samples}
    for sample in other.samples:
        key = _key(sample)
        known = samples.get(key)
        if known is not None:
            sample = Sample(sample.suffix, sample.labels, merge(known.value, sample.value))
        samples[key] = sample
    return Family(one.name, one.kind, one.help, list(samples.values()), one.merge)


def _key(sample: Sample) -> tuple[str, tuple[tuple[str, str], ...]]:
    return sample.suffix, tuple(sorted(sample.labels.items()))


def exposition(families: Iterable[Family]) -> str:
    """Give the Prometheus text (version 0.0.4). A family without a sample is left out."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        name = NAMESPACE + family.name
        lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
        for sample in family.samples:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in sample.labels.items())
            labels = f"{{{inside}}}" if inside else ""
            lines.append(f"{name}{sample.suffix}{labels} {sample.value:.15g}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

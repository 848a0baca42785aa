"""The results as Markdown: the part of docs/performance.md between its two marks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.race import MEASURES, MESH, Row, spread
from bench.results import Results, rows
from bench.targets import judge

BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"


def replace_between_marks(document: str, text: str) -> str:
    """Put `text` between the marks. Raises `ValueError` where the document has none."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def render(results: Results) -> str:
    """Give the Markdown of a whole run."""
    parts = results["parts"]
    blocks = ["## Machine and programs", _machine(results), "## What was to be reached"]
    blocks.append(_targets(parts))
    blocks += ["## All measurements", _how_to_read(parts)]
    for part in parts.values():
        blocks += [f"### {part['title']}", *_part(part)]
    return "\n\n".join(blocks)


def table(head: Iterable[str], body: Iterable[Iterable[str]], texts: int = 2) -> str:
    """Give a Markdown table; the first `texts` columns are to the left, the others to the right."""
    names = list(head)
    lines = [names, ["---"] * min(texts, len(names)) + ["---:"] * (len(names) - texts), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _machine(results: Results) -> str:
    found = dict(results["machine"])
    for build in builds(results["parts"]):
        found |= {name: text for name, text in build.items() if name != "code"}
        found["dstack-mesh"] = f"{build['dstack-mesh']}, {code(build)}"
    return table(["", ""], found.items())


def builds(parts: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Give the different builds of the mesh that the parts were measured with."""
    different: list[dict[str, str]] = []
    for part in parts.values():
        if part["build"] not in different:
            different.append(part["build"])
    return different


def code(build: dict[str, str]) -> str:
    """Say what kind of code the subject's hot modules were."""
    return "compiled hot modules" if build["code"] == "compiled" else "pure Python"


def _targets(parts: dict[str, dict[str, Any]]) -> str:
    lines = [(one.name, one.wanted, one.measured, one.verdict) for one in judge(parts)]
    return table(["what", "wanted", "measured: median (min to max)", "verdict"], lines, texts=4)


def _how_to_read(parts: dict[str, dict[str, Any]]) -> str:
    dates = sorted({part["date"] for part in parts.values()})
    kinds = {code(build) for build in builds(parts)}
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    text = (
        f"Measured {when}, mesh in {' and '.join(sorted(kinds))}. Columns with a name are medians"
        " over the rounds; mesh / peer is the median of the ratios within each round, and in"
        " parentheses the smallest and the largest of them."
    )
    if len(kinds) > 1 or len(dates) > 1:
        text += " Parts differ in when, or with which build, they ran: each says so."
    return text


def _part(part: dict[str, Any]) -> list[str]:
    blocks: list[str] = [f"{part['date']}, {part['rounds']} rounds, mesh in {code(part['build'])}."]
    found = rows(part)
    peers = list(dict.fromkeys(name for row in found for name in row.values if name != MESH))
    if found:
        head = ["scenario", "measure", MESH, *peers]
        compared = [peer for peer in peers if _compared(found, peer)]
        head += [f"{MESH} / {peer}" for peer in compared]
        blocks.append(table(head, (_line(row, peers, compared) for row in found)))
    if part["plain"]:
        blocks.append(table(["", ""], ((key, str(value)) for key, value in part["plain"].items())))
    return [*blocks, *part["notes"]]


def _compared(found: list[Row], peer: str) -> bool:
    return any(MESH in row.values and peer in row.values for row in found)


def _line(row: Row, peers: list[str], compared: list[str]) -> list[str]:
    alone = len(row.values) == 1
    line = [row.scenario, MEASURES[row.measure]]
    line += [_value(row, name, with_spread=alone) for name in (MESH, *peers)]
    return line + [_ratio(row, peer) for peer in compared]


def _value(row: Row, name: str, *, with_spread: bool) -> str:
    if name not in row.values:
        return ""
    middle = spread(row.values[name])
    text = number(middle.median)
    if with_spread and len(row.values[name]) > 1:
        text += f" ({number(middle.low)} to {number(middle.high)})"
    return text


def _ratio(row: Row, peer: str) -> str:
    if peer not in row.values or MESH not in row.values:
        return ""
    ratios = row.ratios(peer)
    if not ratios:
        return ""
    middle = spread(ratios)
    text = f"{middle.median:.2f}"
    return text if len(ratios) == 1 else f"{text} ({middle.low:.2f} to {middle.high:.2f})"


def number(value: float) -> str:
    """Write a value with three digits, or all those before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"

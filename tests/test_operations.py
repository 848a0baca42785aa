"""docs/operations.md against the code: no error, metric or event that the other does not know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dstack_mesh import errors
from dstack_mesh.errors import MeshError
from tests.integration.harness import mesh
from tests.ops.test_prometheus import known

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "dstack_mesh"
TEXT = (ROOT / "docs" / "operations.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Give the cells of the first table below a heading."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_error_code_has_its_cause_and_remedy() -> None:
    codes = {
        found.code: found.status
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, MeshError) and found is not MeshError
    }
    table = rows("Error codes")
    assert {quoted(code)[0]: int(status) for code, status, *_ in table} == codes
    assert len(table) == len(codes)
    for code, _, cause, remedy in table:
        assert len(cause) > 20, code
        assert len(remedy) > 20, code


async def test_every_metric_has_its_row_with_its_labels(tmp_path: Path) -> None:
    async with mesh(tmp_path, ("a", "b", "c")) as one:
        series = await known(one)
    found: dict[str, set[str]] = {}
    for name, labels in series.items():
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        found.setdefault(family, set()).update(labels - {"le"})
    table = {quoted(name)[0]: set(quoted(labels)) for name, labels, _ in rows("Metrics")}
    assert table == found


def events() -> set[str]:
    """Give the names of all events that the mesh's own code writes."""
    found: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        if {"sim", "demo"} & set(file.relative_to(SOURCE).parts):
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        assigned = {ast.unparse(n.targets[0]): n.value for n in nodes if isinstance(n, ast.Assign)}
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            place = {"event": 2, "LogLimit": 1}.get(ast.unparse(node.func))  # where its name is
            if place is not None and len(node.args) > place:
                name = node.args[place]
                name = assigned.get(ast.unparse(name), name)
                said = [n.value for n in ast.walk(name) if isinstance(n, ast.Constant)]
                found |= {one for one in said if isinstance(one, str)}
    return found


def test_every_event_has_its_row() -> None:
    named = [name for cell, *_ in rows("Logs") for name in quoted(cell)]
    assert len(named) == len(set(named))
    assert set(named) == events()


def test_every_alert_is_in_the_runbook_or_explains_itself() -> None:
    alerts = re.findall(
        r"- alert: (\w+)\n(?:.*\n)*?.*description: \"(.*)\"", (ROOT / "docs/alerts.yml").read_text()
    )
    assert len(alerts) == 14
    for alert, description in alerts:
        assert f"`{alert}`" in TEXT or len(description) > 20, alert


def test_the_screenshots_are_small() -> None:
    for name in ("status-light.png", "status-dark.png"):
        assert (ROOT / "docs" / name).stat().st_size < 200_000

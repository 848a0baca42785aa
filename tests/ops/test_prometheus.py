"""The metrics as Prometheus itself reads them, and what is made from them in docs/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.harness import Mesh, eventually
from tests.ops.asking import ask
from tests.ops.prometheus import needs_prometheus, needs_promtool, prometheus, promtool
from tests.ops.test_metrics import parse

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "docs" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "grafana.json"

_NAME = re.compile(r"dstack_mesh_[a-z_]+")
_SELECTOR = re.compile(r"(dstack_mesh_[a-z_]+)\{([^}]*)\}")
_MATCHED = re.compile(r"(\w+)\s*(?:=~|!=|!~|=)")
_GROUPED = re.compile(r"(?:by|on)\s*\(([^)]*)\)")
_OF_PROMETHEUS = {"job", "instance", "le"}


async def busy(one: Mesh) -> str:
    """Give the metrics of a mesh in which everything that has one has happened."""
    await one.start("a", MESH_LABEL_APPS=one.app_id("b"))
    await one.start("b", MESH_ALLOWED_APPS=one.app_id("a"))
    await one.start("c")
    for _ in range(3):
        await one.call("a", "b", "POST", body=b"x")
    await one.call("b", "a")
    await one.call("a", None, path="/info")
    await one.call("a", "ee" * 20)
    await one.call("c", "b")
    await eventually(lambda: len(one.sidecars["a"].journal.incidents()) == 1)
    return (await ask(one, "a", "/metrics"))[1].decode()


async def known(one: Mesh) -> dict[str, set[str]]:
    """Give the labels of each series that there is."""
    found: dict[str, set[str]] = {}
    for name, family in parse(await busy(one)).items():
        for suffix, labels in family.samples:
            found.setdefault(name + suffix, set()).update(dict(labels))
    return found


def expressions() -> Iterator[str]:
    """Give what the dashboard's panels ask."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def wrong(expression: str, series: dict[str, set[str]]) -> list[str]:
    """Say which series and labels in `expression` there are not."""
    names = set(_NAME.findall(expression))
    found = sorted(names - set(series))
    for name, matchers in _SELECTOR.findall(expression):
        labels = set(_MATCHED.findall(re.sub(r'"[^"]*"', '""', matchers)))
        found += sorted(labels - series.get(name, set()) - _OF_PROMETHEUS)
    some = set.union(set(), *(series.get(name, set()) for name in names))
    for group in _GROUPED.findall(expression):
        labels = {label.strip() for label in group.split(",")}
        found += sorted(labels - some - _OF_PROMETHEUS)
    return found


@needs_promtool
async def test_promtool_finds_nothing_wrong_with_the_text(one: Mesh) -> None:
    text = await busy(one)
    assert "dstack_mesh_peer_requests_total" in text
    assert promtool("check", "metrics", text=text).strip() == ""


@needs_prometheus
async def test_a_prometheus_scrapes_a_sidecar(one: Mesh, tmp_path: Path) -> None:
    await busy(one)
    data = tmp_path / "prometheus"
    data.mkdir()
    async with prometheus(data, one.admin("a"), ALERTS) as server:
        await server.until("up == 1")
        (total,) = await server.until(
            'sum(dstack_mesh_requests_total{direction="outbound", code=""})'
        )
        assert total["value"][1] == "3"
        (inside,) = await server.query(
            'dstack_mesh_request_duration_seconds_bucket{direction="outbound", le="+Inf"}'
        )
        assert inside["value"][1] == "4", "3 well, 1 without a target"
        (left,) = await server.query(
            "dstack_mesh_identity_expiry_timestamp_seconds - time() > 3600"
        )
        assert left["metric"]["job"] == "dstack-mesh"
        (target,) = (await server.get("/api/v1/targets"))["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        (group,) = (await server.get("/api/v1/rules"))["groups"]
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
        assert len(group["rules"]) > 10
        seen = {one["metric"]["__name__"] for one in await server.query('{job="dstack-mesh"}')}
        for expression in expressions():
            assert set(_NAME.findall(expression)) <= seen
            shown = expression.replace("$__rate_interval", "1m")
            await server.query(shown.replace("$job", ".*").replace("$instance", ".*"))


@needs_promtool
def test_the_alert_rules_are_rules_and_fire_when_they_should() -> None:
    assert "14 rules found" in promtool("check", "rules", str(ALERTS))
    promtool("test", "rules", str(ROOT / "tests" / "ops" / "alerts_test.yml"))


def test_every_alert_is_tested() -> None:
    names = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    tests = (ROOT / "tests" / "ops" / "alerts_test.yml").read_text()
    for name in names:
        fires = re.search(rf"alertname: {name}\n\s+exp_alerts:\n\s+- exp_labels", tests)
        assert fires, f"no test sees {name} fire"


async def test_dashboard_and_alerts_ask_for_what_there_is(one: Mesh) -> None:
    series = await known(one)
    for expression in [*expressions(), ALERTS.read_text()]:
        assert wrong(expression, series) == [], expression
    shown = {name for expression in expressions() for name in _NAME.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in series}


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("rate(dstack_mesh_gone_total[5m])", ["dstack_mesh_gone_total"]),
        ('dstack_mesh_requests_total{cod="x"}', ["cod"]),
        ("sum by (waay) (dstack_mesh_requests_total)", ["waay"]),
        ('sum by (code, job) (dstack_mesh_requests_total{code=~"a=b", instance="c"})', []),
    ],
)
def test_what_there_is_not_would_be_seen(expression: str, found: list[str]) -> None:
    assert wrong(expression, {"dstack_mesh_requests_total": {"code"}}) == found


def test_the_dashboards_panels_fit_together() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}

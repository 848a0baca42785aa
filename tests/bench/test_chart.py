from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from bench.chart import bars, draw
from bench.race import Spread

NAMESPACE = {"svg": "http://www.w3.org/2000/svg"}


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"parts": {"small-get": {"title": "Outbound, small GET", "rows": list(rows)}}}


SMALL = {
    "scenario": "small GET, 32 connections",
    "measure": "cpu_us",
    "values": {"mesh": [22.0, 24.0, 30.0], "nginx": [20.0, 20.0, 20.0]},
}


def test_cpu_time_beside_nginx_is_drawn_and_nothing_else() -> None:
    rate = SMALL | {"measure": "rate"}
    alone = SMALL | {"values": {"mesh": [1.0]}}

    (bar,) = bars(results(SMALL, rate, alone))

    assert bar.label == "Outbound: small GET, 32 connections"
    assert bar.ratio == Spread(1.2, 1.1, 1.5)
    assert bar.limit == 1.1


def test_the_drawing_has_a_bar_to_scale_for_each() -> None:
    other = SMALL | {"scenario": "A < B", "values": {"mesh": [48.0], "nginx": [20.0]}}

    svg = ElementTree.fromstring(draw(results(SMALL, other)))

    first, second = svg.findall("svg:rect", NAMESPACE)
    width = float(first.attrib["width"])
    assert float(second.attrib["width"]) / width == 2.0
    assert "Outbound: A < B" in {text.text for text in svg.findall("svg:text", NAMESPACE)}
    drawn = float(second.attrib["x"]) + float(second.attrib["width"])
    assert drawn < float(svg.attrib["width"])


def test_it_is_readable_on_dark_pages() -> None:
    svg = draw(results(SMALL))

    assert "prefers-color-scheme: dark" in svg
    assert "background" not in svg

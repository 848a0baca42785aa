"""The mesh's CPU time beside nginx's, as an SVG that is readable on light and dark pages."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from bench.contestants import NGINX
from bench.race import MESH, Spread, spread
from bench.results import Results, rows
from bench.targets import TARGETS

MEASURES = ("cpu_us", "cpu_ms_100mb", "cpu_us_connection")
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 860, 370, 60, 22, 58

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 14px; font-weight: 600 } .small { fill: #59636e; font-size: 11px }
.bar { fill: #3b82c4 } .noise { stroke: #1f2328; stroke-width: 1.2 }
.peer { stroke: #59636e; stroke-width: 1.5 } .grid { stroke: #8c959f; opacity: .3 }
.limit { fill: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .bar { fill: #539bf5 }
  .noise { stroke: #e6edf3 } .peer { stroke: #9198a1 } .limit { fill: #f0883e }
}
"""


_HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{{height}}"
 viewBox="0 0 {_WIDTH} {{height}}" role="img">
<title>CPU time of the mesh relative to nginx</title>
<style>{{style}}</style>
<text class="title" x="10" y="22">CPU time of the mesh, relative to nginx in the same round
 (shorter is better)</text>
<text class="small" x="10" y="40">Bars are medians, thin lines the smallest and largest round;
 \u25bc is what was to be reached, the upright line is nginx.</text>"""


@dataclass(frozen=True)
class Bar:
    """One line of the chart."""

    label: str
    ratio: Spread
    limit: float | None


def bars(results: Results) -> list[Bar]:
    """Give what is drawn: each measure of CPU time for which both were measured."""
    found = []
    for name, part in results["parts"].items():
        for row in rows(part):
            if row.measure not in MEASURES or not {MESH, NGINX} <= row.values.keys():
                continue
            ratios = row.ratios(NGINX)
            if ratios:
                side = part["title"].partition(",")[0].partition(":")[0]
                label = f"{side}: {row.scenario}"
                limit = _limit(name, row.scenario, row.measure)
                found.append(Bar(label, spread(ratios), limit))
    return found


def _limit(part: str, scenario: str, measure: str) -> float | None:
    for target in TARGETS:
        if (
            target.part == part
            and target.measure == measure
            and target.peer == NGINX
            and scenario.startswith(target.scenario)
        ):
            return target.limit
    return None


def draw(results: Results) -> str:
    """Give the SVG."""
    lines = bars(results)
    most = max([1.5, *(bar.ratio.high for bar in lines), *(bar.limit or 0 for bar in lines)])
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    height = _TOP + _ROW * len(lines) + 34
    bottom = _TOP + _ROW * len(lines) + 4

    def at(ratio: float) -> str:
        return f"{_LEFT + ratio * scale:.1f}"

    parts = [_HEAD.format(height=height, style=_STYLE)]
    for tick in _ticks(most):
        parts.append(f'<path class="grid" d="M{at(tick)} {_TOP - 6}V{bottom}"/>')
        parts.append(
            f'<text class="small" x="{at(tick)}" y="{bottom + 16}" text-anchor="middle">'
            f"{tick:g}</text>"
        )
    for number, bar in enumerate(lines):
        parts += _bar(bar, _TOP + _ROW * number, scale)
    parts.append(f'<path class="peer" d="M{at(1)} {_TOP - 6}V{bottom}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(most: float) -> list[float]:
    step = 0.5 if most <= 4 else 1.0 if most <= 10 else 5.0
    return [step * number for number in range(int(most / step) + 1)]


def _bar(bar: Bar, top: float, scale: float) -> list[str]:
    middle, width = top + 8, bar.ratio.median * scale
    low, high = _LEFT + bar.ratio.low * scale, _LEFT + bar.ratio.high * scale
    parts = [
        f'<text x="{_LEFT - 8}" y="{top + 12}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect class="bar" x="{_LEFT}" y="{top + 2}" width="{width:.1f}" height="12" rx="2"/>',
        f'<path class="noise" d="M{low:.1f} {middle}H{high:.1f}"/>',
        (
            f'<text class="small" x="{max(high, _LEFT + width) + 6:.1f}" y="{top + 12}">'
            f"{bar.ratio.median:.2f}</text>"
        ),
    ]
    if bar.limit is not None:
        x = _LEFT + bar.limit * scale
        parts.append(
            f'<path class="limit" d="M{x - 4:.1f} {top - 2}h8l-4 6z"><title>target'
            f" {bar.limit:g}</title></path>"
        )
    return parts

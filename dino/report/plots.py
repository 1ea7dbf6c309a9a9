"""Curves as SVG inside the page: readable at any width, light or dark, with values where the pointer is."""

import html
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 26, 36  # margins
STRIPS = 80  # columns of a panel that tell their values
POINTS = 400  # of a line; longer ones keep the least and the greatest of each stretch


class Line(NamedTuple):
    """Values over steps; of several in a panel each has a name."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


class Panel(NamedTuple):
    """Lines with a title.

    Attributes:
        healthy: where the values lie in healthy runs, shaded as far as the lines reach.
        levels: values to compare with, as dashed lines, by name.
    """

    title: str
    lines: Sequence[Line]
    healthy: tuple[float, float] | None = None
    levels: dict[str, float] | None = None


def line_of(metrics: Sequence[dict], metric: str, name: str = "") -> Line:
    """The finite values of a metric."""
    points = [(line["step"], line[metric]) for line in metrics if _is_number(line.get(metric))]
    return Line(name, [step for step, _ in points], [value for _, value in points])


def panels(
    metrics: Sequence[dict], titles: dict[str, str], ranges: dict[str, tuple[float, float]] | None = None
) -> list[Panel]:
    """A panel for each metric of `titles` that some line has.

    Args:
        metrics: lines of metrics.jsonl.
        titles: metric to the title of its panel.
        ranges: metric to where it lies in healthy runs.
    """
    shown = {name: line_of(metrics, name) for name in titles}
    return [Panel(titles[name], [line], (ranges or {}).get(name)) for name, line in shown.items() if line.steps]


def svg(panel: Panel) -> str:
    """The panel as an `<svg>` element; its colours are those of the page's style."""
    lines = [line for line in panel.lines if line.steps]
    x = _Axis(min(min(line.steps) for line in lines), max(max(line.steps) for line in lines), LEFT, WIDTH - RIGHT)
    y = _Axis(*_extent(panel, lines), HEIGHT - BOTTOM, TOP)
    title = html.escape(panel.title)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">']
    parts.append(f'<text class="title" x="{LEFT}" y="15">{title}</text>')
    if panel.healthy is not None:
        top, bottom = y.at(min(panel.healthy[1], y.high)), y.at(max(panel.healthy[0], y.low))
        parts.append(_rectangle("healthy", LEFT, top, WIDTH - RIGHT - LEFT, bottom - top))
    for tick in y.ticks(4):
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y.at(tick) + 3.5, f"{tick:.3g}", "end"))
    for tick in x.ticks(4, are_whole=True):
        position = min(x.at(tick), WIDTH - RIGHT - 10)
        parts.append(f'<text class="tick" x="{position:.1f}" y="{HEIGHT - 21}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
    )
    for name, level in (panel.levels or {}).items():
        parts.append(f'<path class="level" d="M{LEFT} {y.at(level):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT + 4, y.at(level) - 4, name, "start"))
    parts += [_path(line, number, x, y) for number, line in enumerate(panel.lines) if line.steps]
    return "".join([*parts, *_strips(panel.lines, x, y), "</svg>"])


class _Axis:
    """Values from `low` to `high` at coordinates from `start` to `stop`."""

    def __init__(self, low: float, high: float, start: float, stop: float):
        if low == high:
            room = abs(low) / 10 or 0.5
            low, high = low - room, high + room
        self.low, self.high, self.start, self.stop = low, high, start, stop

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int, are_whole: bool = False) -> list[float]:
        """About so many round values; of a few steps none lies between two of them."""
        values = MaxNLocator(count, integer=are_whole).tick_values(self.low, self.high)
        return [value for value in values if self.low <= value <= self.high]


def _extent(panel: Panel, lines: Sequence[Line]) -> tuple[float, float]:
    """All values and levels, and of the healthy range at least the near edge."""
    values = [value for line in lines for value in line.values] + list((panel.levels or {}).values())
    low, high = min(values), max(values)
    if panel.healthy is not None:
        low, least = min(low, panel.healthy[0]), max(high, panel.healthy[0])
        high = max(high, min(panel.healthy[1], least + 0.3 * (least - low)))
    room = 0.04 * (high - low)
    return low - room, high + room


def _path(line: Line, number: int, x: _Axis, y: _Axis) -> str:
    points = _thinned(list(zip(line.steps, line.values, strict=True)))
    text = " ".join(f"{x.at(step):.1f},{y.at(value):.1f}" for step, value in points)
    if len(points) == 1:
        return f'<circle class="dot c{number % 8}" cx="{x.at(points[0][0]):.1f}" cy="{y.at(points[0][1]):.1f}" r="3"/>'
    return f'<polyline class="line c{number % 8}" points="{text}"/>'


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of them, no peak lost."""
    size = math.ceil(2 * len(points) / POINTS)
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def _strips(lines: Sequence[Line], x: _Axis, y: _Axis) -> list[str]:
    """Columns which, under the pointer, mark the points in them and tell their values."""
    columns: dict[int, list[tuple[int, float, float]]] = {}
    for number, line in enumerate(lines):
        last = {int((x.at(step) - LEFT) / (WIDTH - RIGHT - LEFT) * (STRIPS - 1)): (step, value)
                for step, value in zip(line.steps, line.values, strict=True)}  # fmt: skip
        for column, point in last.items():
            columns.setdefault(column, []).append((number, *point))
    parts, edges = [], _edges(sorted(columns))
    for (_, points), left, right in zip(sorted(columns.items()), edges, edges[1:], strict=False):
        texts = [f"{lines[number].name or 'value'} {value:.4g} (step {step:,.0f})" for number, step, value in points]
        dots = "".join(
            f'<circle class="c{number % 8}" cx="{x.at(step):.1f}" cy="{y.at(value):.1f}" r="3"/>'
            for number, step, value in points
        )
        area = _rectangle("strip", left, TOP, right - left, HEIGHT - TOP - BOTTOM)
        parts.append(f'<g class="at">{area}{dots}<title>{html.escape(chr(10).join(texts))}</title></g>')
    return parts


def _edges(columns: Sequence[int]) -> list[float]:
    """Where the strips of these columns begin and end: half-way between them."""
    middles = [LEFT + column * (WIDTH - RIGHT - LEFT) / (STRIPS - 1) for column in columns]
    return [LEFT, *((one + other) / 2 for one, other in pairwise(middles)), WIDTH - RIGHT]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _rectangle(kind: str, left: float, top: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{max(0.0, height):.1f}"/>'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

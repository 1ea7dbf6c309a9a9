"""Curves of a page: each point lies where its value says, nothing is lost that a reader would miss, text is escaped."""

import math
import re
from html.parser import HTMLParser

import pytest

from dino.report.plots import Line, Panel, panels, svg


class Drawing(HTMLParser):
    """Elements of an SVG by their class, and the text of each `<title>`."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[dict[str, str]] = []
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.elements.append({"tag": tag} | {name: value or "" for name, value in attributes})

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "title":
            self.titles.append(data)

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [element for element in self.elements if name in element.get("class", "").split()]

    def points(self, number: int = 0) -> list[tuple[float, float]]:
        (line,) = [element for element in self.of_class(f"c{number}") if element["tag"] == "polyline"]
        return [tuple(map(float, point.split(","))) for point in line["points"].split()]


def test_equal_differences_are_equal_distances_and_more_is_higher():
    """A straight line stays one; the other way round for a falling one."""
    drawing = Drawing(svg(Panel("loss", [Line("", [0, 10, 20, 40], [1.0, 2.0, 3.0, 5.0])])))
    (x0, y0), (x1, y1), (x2, y2), (x4, y4) = drawing.points()
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert x4 - x2 == pytest.approx(2 * (x1 - x0), abs=0.3)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1 > y2 > y4  # SVG counts from the top


def test_every_point_tells_its_value_and_a_peak_is_not_lost_among_many():
    few = Drawing(svg(Panel("loss", [Line("a", [10, 20], [0.123456, 7]), Line("b", [10], [3])])))
    assert few.titles == ["a 0.1235 (step 10)\nb 3 (step 10)", "a 7 (step 20)"]
    steps = list(range(100_000))
    values = [math.sin(step / 5000) for step in steps]
    values[54_321] = 50.0
    text = svg(Panel("loss", [Line("", steps, values)]))
    points = Drawing(text).points()
    assert len(points) <= 400
    assert min(y for _, y in points) < 40  # the peak is at the top
    assert len(text) < 40_000


@pytest.mark.parametrize("values", [[0.1, 0.2], [0.5, 0.6], [5.0, 7.0], [0.5]])
def test_a_healthy_range_is_shaded_as_far_as_the_panel_reaches(values):
    """Wherever the curve lies: below, inside and above the range."""
    metrics = [{"step": step, "health/rank_me": value} for step, value in enumerate(values)]
    (panel,) = panels(metrics, {"health/rank_me": "rank"}, {"health/rank_me": (0.4, 1.0)})
    (shaded,) = Drawing(svg(panel)).of_class("healthy")
    assert float(shaded["height"]) > 0
    assert 0 <= float(shaded["y"]) <= 210
    (plain,) = panels(metrics, {"health/rank_me": "rank"}, {"other": (0.4, 1.0)})
    assert Drawing(svg(plain)).of_class("healthy") == []


def test_what_is_missing_or_no_number_is_passed_over():
    metrics = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3, "a": math.nan}, {"step": 4, "a": math.inf}]
    metrics += [{"step": 5, "a": "healthy"}, {"step": 6, "b": 2.0}, {"step": 7, "a": 3.0}]
    shown = panels(metrics, {"a": "A", "b": "B", "absent": "C"})
    assert [panel.title for panel in shown] == ["A", "B"]
    assert list(shown[0].lines[0].steps) == [1, 7]
    for panel in shown:
        assert "nan" not in svg(panel)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e30])
def test_a_value_that_never_changes_is_a_level_line(value):
    points = Drawing(svg(Panel("rate", [Line("", [0, 5, 9], [value] * 3)]))).points()
    assert len({y for _, y in points}) == 1
    assert all(math.isfinite(y) for _, y in points)


def test_levels_are_named_and_every_text_is_escaped():
    evil = "<script>alert(1)</script>&"
    text = svg(Panel(evil, [Line(evil, [1, 2], [0.1, 0.9])], levels={evil: 0.5}))
    assert "<script" not in text
    assert Drawing(text).titles[0].startswith(evil)
    assert len(Drawing(text).of_class("level")) == 1
    assert len(re.findall("&lt;script&gt;", text)) == 5  # aria label, heading, level, and a strip for each point


@pytest.mark.parametrize("steps", [[10], [1, 2], [0, 1000]])
def test_no_step_stands_twice_under_a_panel(steps):
    text = svg(Panel("loss", [Line("", steps, [0.5] * len(steps))]))
    labels = re.findall(r'class="tick"[^>]*>([\d,]+)<', text)
    assert labels
    assert len(set(labels)) == len(labels)

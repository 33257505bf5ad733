"""Charts are well-formed, show their points where they belong, and choose round ticks."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from fp4compile.report.chart import Line, Panel, chart_svg, number_text, ticks

SVG = "{http://www.w3.org/2000/svg}"


def chart(*lines: Line, **more) -> ElementTree.Element:
    return ElementTree.fromstring(chart_svg([Panel(title="loss < 4", x="tokens", y="nats", lines=lines, **more)], title="a & b"))


def path_of(root: ElementTree.Element, label: str) -> list[tuple[float, float]]:
    path = next(p for p in root.iter(f"{SVG}path") if (t := p.find(f"{SVG}title")) is not None and t.text == label)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.attrib["d"])]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (3.21, 3.59, [3.3, 3.4, 3.5]),
        (-0.02, 0.05, [-0.02, 0, 0.02, 0.04]),
        (0, 1e8, [0, 2e7, 4e7, 6e7, 8e7, 1e8]),
    ],
)
def test_ticks_are_round(low, high, expected) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_points_lie_in_proportion() -> None:
    root = chart(Line(label="up", points=((0, 0), (5, 1), (10, 2))), Line(label="flat", points=((0, 2), (10, 2))))
    (x0, y0), (x1, y1), (x2, y2) = path_of(root, "up")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y0  # up is less in SVG
    assert path_of(root, "flat") == [(x0, y2), (x2, y2)]


def test_text_is_escaped_and_there_is_one_legend_entry_a_label() -> None:
    line = Line(label="a<b", points=((0, 1), (1, 2)))
    panels = [Panel(title=t, x="x", y="y", lines=(line,)) for t in ("one", "two")]
    root = ElementTree.fromstring(chart_svg(panels, title="two panels"))
    assert [t.text for t in root.iter(f"{SVG}text")].count("a<b") == 1
    assert {t.text for t in chart(line).iter(f"{SVG}text")} >= {"loss < 4", "a & b", "tokens", "nats"}


def test_what_is_not_finite_is_left_out() -> None:
    root = chart(Line(label="gap", points=((0, 1), (1, math.nan), (2, math.inf), (3, 2))))
    assert len(path_of(root, "gap")) == 2
    assert "no points" in {t.text for t in chart(Line(label="none", points=((0, math.nan),))).iter(f"{SVG}text")}


def test_a_given_range_holds_what_is_beyond_it_at_its_edge() -> None:
    (_, low), (_, high), (_, inside) = path_of(chart(Line(label="l", points=((0, -9), (1, 9), (2, 0))), y_range=(-1, 1)), "l")
    assert high < inside < low and inside == pytest.approx((low + high) / 2, abs=0.2)


def test_one_point_is_a_dot_and_equal_values_are_a_line() -> None:
    assert len(list(chart(Line(label="dot", points=((1, 1),))).iter(f"{SVG}circle"))) == 1
    assert len(path_of(chart(Line(label="same", points=((0, 3), (1, 3)))), "same")) == 2


@pytest.mark.parametrize(("value", "text"), [(20e6, "20M"), (1500, "1.5k"), (0.05, "0.05"), (0.0, "0"), (-3.4, "-3.4")])
def test_numbers_are_short(value, text) -> None:
    assert number_text(value) == text

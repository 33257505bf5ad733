"""The picture is well-formed, has every series under its own colour and name, and puts faster above slower."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from fp4compile.bench.plot import svg_of
from fp4compile.bench.results import Row

SVG = "{http://www.w3.org/2000/svg}"


def row(m: int, activation: str = "bf16", n: int = 64, floor: float = 1.0, **times: float) -> Row:
    case = {"n": n, "k": 32, "m": m, "format": "nvfp4", "activation": activation}
    return Row(kind="matmul", key=f"{n} {m} {activation}", case=case, times=times, floor=floor, floor_by="bytes")


def picture(rows) -> ElementTree.Element:
    return ElementTree.fromstring(svg_of(rows, title="Speed of <ours> & others", subtitle="a device"))


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(SVG + "text")]


def path_of(root: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    for group in root.iter(SVG + "g"):
        title = group.find(SVG + "title")
        if title is not None and title.text == name:
            path = group.find(SVG + "path")
            assert path is not None
            return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", ""))]
    raise AssertionError(f"no line {name}")


def test_every_series_has_a_line_a_name_and_colours_for_both_papers() -> None:
    rows = [row(m, ours=2.0, bf16=6.0, int4=3.0, someone=4.0) for m in (1, 16, 256)]
    root = picture(rows)
    for name in ("ours", "bf16", "int4", "someone", "floor"):
        assert len(path_of(root, name)) == 3
        assert name in texts(root)
    style = root.find(SVG + "style")
    assert style is not None and style.text is not None
    light, dark = style.text.split("@media (prefers-color-scheme: dark)")
    for css in ("s-ours", "s-bf16", "s-int4", "s-floor", "paper"):
        assert css in light and css in dark
    assert "Speed of <ours> & others" in texts(root) and "a device" in texts(root)


def test_faster_is_higher_more_rows_are_further_right_and_axes_are_logarithmic() -> None:
    root = picture([row(1, ours=1.0, bf16=4.0), row(4, ours=2.0, bf16=4.0), row(16, ours=4.0, bf16=4.0)])
    (x1, y1), (x4, y2), (x16, y4) = path_of(root, "ours")
    assert x4 - x1 == pytest.approx(x16 - x4, abs=0.2) and x1 < x4
    assert y2 - y1 == pytest.approx(y4 - y2, abs=0.2) and y1 < y2
    assert path_of(root, "bf16")[2][1] == y4
    for tick in ("1", "4", "16", "1x", "2x"):
        assert tick in texts(root)


def test_a_panel_a_shape_and_scheme_and_gaps_where_nothing_was_timed() -> None:
    rows = [row(1, ours=1.0, bf16=2.0), row(8, bf16=2.0), row(1, activation="fp4", ours=1.0, bf16=2.0), row(1, n=128, ours=1.0)]
    root = picture(rows)
    headings = [text for text in texts(root) if " x 32, " in text]
    assert headings == ["64 x 32, nvfp4 W4A16", "64 x 32, nvfp4 W4A4"]
    assert len(path_of(root, "ours")) == 1 and len(path_of(root, "bf16")) == 2


def test_nothing_beside_bf16_is_no_picture() -> None:
    assert svg_of([row(1, ours=1.0)], title="", subtitle="") == ""
    quantize = Row(kind="quantize", key="q", case={}, times={"ours": 1.0, "bf16": 1.0})
    assert svg_of([quantize], title="", subtitle="") == ""


def test_names_at_the_ends_never_touch() -> None:
    same = {f"peer{i}": 2.0 + i / 1000 for i in range(8)}
    root = picture([row(m, ours=2.0, bf16=2.0, **same) for m in (1, 2)])
    names = {*same, "ours", "bf16", "floor"}
    ys = sorted(float(t.get("y", "0")) for t in root.iter(SVG + "text") if t.text in names)
    assert len(ys) == 11 and all(below - above >= 12.9 for above, below in itertools.pairwise(ys))

"""Line charts as an SVG file that every browser shows: no plotting library, no scripts, no fonts to install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_FONT: Final = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
_EM: Final = 0.61  # no font of the list is wider, so text measured by its length never leaves its place
# Okabe and Ito's colours: apart for colour-blind readers, and in print on white.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333", "#8a8a00")
_WIDTH, _HEIGHT, _MARGIN = 460.0, 250.0, 24.0
_LEFT, _BOTTOM, _TOP = 62.0, 40.0, 28.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points in the order in which they are joined. A point whose y is not finite interrupts the line."""

    label: str
    points: tuple[tuple[float, float], ...]
    dots: bool = False  # marks instead of a line

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. Lines of one label have one colour in all panels of a chart."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    y_range: tuple[float, float] | None = None  # default: all points


def chart_svg(panels: Sequence[Panel], *, title: str, subtitle: Sequence[str] = (), columns: int = 2) -> str:
    """A drawing of `panels` in rows of `columns` on white, under a title, lines of text and one legend."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    columns = min(columns, max(len(panels), 1))
    width = max(columns * (_WIDTH + _MARGIN) + _MARGIN, 520.0)
    head, top = _head(title, subtitle, labels, colour, width)
    bodies = []
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        at = _MARGIN + column * (_WIDTH + _MARGIN), top + row * (_HEIGHT + _MARGIN)
        bodies.append(f'<g transform="translate({at[0]:.1f},{at[1]:.1f})">{_panel(panel, colour)}</g>')
    height = top + math.ceil(len(panels) / columns) * (_HEIGHT + _MARGIN)
    size = f'width="{width:.0f}" height="{height:.0f}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}">'
    return "\n".join([opening, f'<rect {size} fill="#ffffff"/>', head, *bodies, "</svg>"]) + "\n"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _head(title: str, subtitle: Sequence[str], labels: Sequence[str], colour: dict[str, str], width: float) -> tuple[str, float]:
    parts, y = [_text(_MARGIN, _MARGIN + 12, title, 16, bold=True)], _MARGIN + 34
    for line in subtitle:
        parts.append(_text(_MARGIN, y, line, 10.5, colour="#444444"))
        y += 16
    x = _MARGIN
    for label in labels:
        wide = len(label) * 10.5 * _EM + 40
        if x > _MARGIN and x + wide > width - _MARGIN:
            x, y = _MARGIN, y + 18
        parts.append(f'<path d="M{x:.1f} {y:.1f} h18" stroke="{colour[label]}" stroke-width="3"/>')
        parts.append(_text(x + 24, y + 4, label, 10.5, colour="#444444"))
        x += wide
    return "\n".join(parts), y + 24


def _panel(panel: Panel, colour: dict[str, str]) -> str:
    points = [point for line in panel.lines for point in line.finite]
    if not points:
        return _text(0, 12, panel.title, 12, bold=True) + _text(_LEFT, 60, "no points", 10.5, colour="#444444")
    xs, ys = _range([x for x, _ in points]), panel.y_range or _padded(_range([y for _, y in points]))
    right, bottom = _WIDTH - 8, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs[0]) / (xs[1] - xs[0]), (y - ys[0]) / (ys[1] - ys[0])
        return _LEFT + across * (right - _LEFT), bottom - up * (bottom - _TOP)

    parts = [_text(0, 12, panel.title, 12, bold=True)]
    for y in ticks(*ys):
        at = place(xs[0], y)[1]
        parts.append(f'<path d="M{_LEFT} {at:.1f} H{right:.1f}" stroke="#e6e6e0"/>')
        parts.append(_text(_LEFT - 6, at + 3.5, number_text(y), 10, anchor="end", colour="#444444"))
    for x in ticks(*xs):
        at = place(x, ys[0])[0]
        parts.append(f'<path d="M{at:.1f} {bottom:.1f} v4" stroke="#8a8a8a"/>')
        parts.append(_text(at, bottom + 16, number_text(x), 10, anchor="middle", colour="#444444"))
    parts.append(f'<path d="M{_LEFT} {_TOP} V{bottom:.1f} H{right:.1f}" fill="none" stroke="#8a8a8a"/>')
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 6, panel.x, 10.5, anchor="middle"))
    parts.append(_text(right, 12, panel.y, 10.5, anchor="end", colour="#444444"))
    inside = [(line, [place(x, min(max(y, ys[0]), ys[1])) for x, y in line.finite]) for line in panel.lines]
    return "".join([*parts, *(_drawn(line, placed, colour[line.label]) for line, placed in inside)])


def _drawn(line: Line, placed: Sequence[tuple[float, float]], colour: str) -> str:
    name = f"<title>{escape(line.label)}</title>"
    if line.dots or len(placed) == 1:
        return f'<g fill="{colour}">{name}' + "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in placed) + "</g>"
    joined = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(placed))
    return f'<path d="{joined}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round">{name}</path>' if placed else ""


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _padded(span: tuple[float, float]) -> tuple[float, float]:
    pad = 0.05 * (span[1] - span[0])
    return span[0] - pad, span[1] + pad


def number_text(value: float) -> str:
    """As few characters as say it: 0.05, 3.4, 20M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def _text(x: float, y: float, text: str, size: float, *, bold: bool = False, anchor: str = "start", colour: str = "#111111") -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}"{weight}{place}>{escape(text)}</text>'

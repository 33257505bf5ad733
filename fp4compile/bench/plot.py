"""How many times as fast as bf16, over the rows of x: one panel a weight shape and scheme, as an SVG that needs neither scripts nor fonts.

Colours follow the reader's light or dark setting; every line also has a marker of its own and its name at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from fp4compile.bench.case import MatmulCase
from fp4compile.bench.peers import BASELINE
from fp4compile.bench.results import OURS, Row

FLOOR: Final = "floor"
_FONT: Final = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 340.0, 230.0, 46.0, 34.0, 112.0, 40.0
_MARGIN, _HEAD, _PER_LINE, _LABEL_GAP = 20.0, 56.0, 3, 13.0
_TICKS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0)


@dataclass(frozen=True)
class Ink:
    """A line's colour on light and on dark paper, its marker and its width."""

    light: str
    dark: str
    marker: str
    width: float = 1.6


# Apart for colour-blind readers: orange, blue, teal, purple, rose differ in lightness too.
_INKS: Final = {
    OURS: Ink("#c05a00", "#ffa040", "circle", 2.6),
    BASELINE: Ink("#3f5f8f", "#8fb4ea", "square"),
    "int4": Ink("#0b7a75", "#4fd0c4", "triangle"),
    "gemlite": Ink("#7a3fa0", "#cf9bf2", "diamond"),
    "torchao": Ink("#b03060", "#ff8fb0", "cross"),
    "compiled bf16": Ink("#6b7a8f", "#a8b4c4", "plus"),
    FLOOR: Ink("#777777", "#a0a0a0", "none", 1.3),
}
_OTHER: Final = Ink("#444444", "#cccccc", "circle")
Points = list[tuple[int, float]]  # (M, times as fast as bf16)


def svg_of(rows: Iterable[Row], *, title: str, subtitle: str) -> str:
    """The picture, empty where nothing was timed beside bf16."""
    panels = _panels(rows)
    if not panels:
        return ""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(len({shape for _, shape in panels}), _PER_LINE)  # a scheme a line, where that fits
    step_x, step_y = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    width = max(2 * _MARGIN + columns * step_x, 2 * _MARGIN + 7.4 * len(subtitle))
    height = _HEAD + -(-len(panels) // columns) * step_y + _MARGIN
    body = [_text(_MARGIN, 24, title, 15, bold=True), _text(_MARGIN, 42, subtitle, 10.5, css="faint")]
    for i, ((scheme, shape), lines) in enumerate(sorted(panels.items(), key=lambda panel: panel[0][0])):
        x, y = _MARGIN + i % columns * step_x + _LEFT, _HEAD + i // columns * step_y + _TOP
        body.append(f'<g transform="translate({x:.1f},{y:.1f})">{_panel(f"{shape}, {scheme}", lines)}</g>')
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="{_FONT}">'
    )
    paper = f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>'
    return "\n".join([opening, f"<title>{escape(title)}</title>", _style(names), paper, *body, "</svg>"]) + "\n"


def _panels(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Points]]:
    """Lines by scheme and shape. What was not timed at some M has no point there."""
    panels: dict[tuple[str, str], dict[str, Points]] = {}
    for row in rows:
        base = row.times.get(BASELINE)
        if row.kind not in ("matmul", "grouped") or not base:
            continue
        case = MatmulCase(**row.case)
        lines = panels.setdefault((case.scheme, case.weight), {})
        for name, time in {**row.times, **({FLOOR: row.floor} if row.floor else {})}.items():
            lines.setdefault(name, []).append((case.m, base / time))
    for lines in panels.values():
        for points in lines.values():
            points.sort()
    return panels


@dataclass(frozen=True)
class _Scales:
    """Logarithmic axes of a panel."""

    rows: tuple[int, int]
    speed: tuple[float, float]

    @classmethod
    def around(cls, lines: Mapping[str, Points]) -> _Scales:
        ms = [m for points in lines.values() for m, _ in points]
        speeds = [speed for points in lines.values() for _, speed in points]
        low, high = min(speeds), max(speeds)
        ticks = [t for t in _TICKS if t <= low] or [low]
        above = [t for t in _TICKS if t >= high] or [high]
        return cls((min(ms), max(ms)), (min(ticks[-1], 0.5), max(above[0], 2.0)))

    def x(self, m: float) -> float:
        return _WIDTH * (0.5 if self.rows[0] == self.rows[1] else _part(m, *self.rows))

    def y(self, speed: float) -> float:
        return _HEIGHT * (1 - _part(speed, *self.speed))


def _part(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _panel(name: str, lines: Mapping[str, Points]) -> str:
    scales = _Scales.around(lines)
    parts = [_text(0, -14, name, 12, bold=True)]
    for tick in [t for t in _TICKS if scales.speed[0] <= t <= scales.speed[1]]:
        y = scales.y(tick)
        parts.append(f'<line class="{"one" if tick == 1 else "grid"}" x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(-6, y + 3.5, f"{tick:g}x", 10, anchor="end", css="faint"))
    ms = sorted({m for points in lines.values() for m, _ in points})
    for m in _legible(ms, scales):
        x = scales.x(m)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"/>')
        parts.append(_text(x, _HEIGHT + 14, f"{m}", 10, anchor="middle", css="faint"))
    parts.append(_text(_WIDTH / 2, _HEIGHT + 30, "M, rows of x", 10, anchor="middle", css="faint"))
    # Ours is drawn last, above the others.
    parts += [_line(line, lines[line], scales) for line in sorted(lines, key=lambda n: n == OURS)]
    return "\n".join([*parts, *_labels(lines, scales)])


def _legible(ms: Sequence[int], scales: _Scales) -> list[int]:
    """Those whose labels do not touch."""
    chosen: list[int] = []
    for m in ms:
        if not chosen or scales.x(m) - scales.x(chosen[-1]) >= 30:
            chosen.append(m)
    return chosen


def _line(name: str, points: Points, scales: _Scales) -> str:
    ink = _INKS.get(name, _OTHER)
    at = [(scales.x(m), scales.y(speed)) for m, speed in points]
    path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(at))
    dashes = ' stroke-dasharray="5 4"' if name == FLOOR else ""
    marks = "".join(_marker(ink.marker, x, y) for x, y in at)
    drawn = f'<path d="{path}" fill="none" stroke-width="{ink.width}"{dashes}/>{marks}'
    return f'<g class="{_css(name)}"><title>{escape(name)}</title>{drawn}</g>'


def _marker(shape: str, x: float, y: float) -> str:
    if shape == "none":
        return ""
    outline = {
        "circle": f"M{x - 3.2:.1f} {y:.1f} a3.2 3.2 0 1 0 6.4 0 a3.2 3.2 0 1 0 -6.4 0 z",
        "square": f"M{x - 2.8:.1f} {y - 2.8:.1f} h5.6 v5.6 h-5.6 z",
        "triangle": f"M{x:.1f} {y - 3.6:.1f} l3.6 6 h-7.2 z",
        "diamond": f"M{x:.1f} {y - 4:.1f} l3.6 4 l-3.6 4 l-3.6 -4 z",
        "cross": f"M{x - 3:.1f} {y - 3:.1f} l6 6 m0 -6 l-6 6",
        "plus": f"M{x - 3.6:.1f} {y:.1f} h7.2 m-3.6 -3.6 v7.2",
    }[shape]
    return f'<path class="mark" d="{outline}"/>'


def _labels(lines: Mapping[str, Points], scales: _Scales) -> list[str]:
    """Names at the ends of the lines, moved apart where they would touch, with a thin line to what they name."""
    ends = sorted((scales.y(points[-1][1]), scales.x(points[-1][0]), name) for name, points in lines.items())
    ys: list[float] = []
    for y, _, _ in ends:
        ys.append(max(y, ys[-1] + _LABEL_GAP) if ys else y)
    overflow = max(0.0, ys[-1] - _HEIGHT)
    for i in reversed(range(len(ys))):  # pushed up from below where the last ones fell off the panel
        ys[i] = min(ys[i], _HEIGHT - (len(ys) - 1 - i) * _LABEL_GAP) if overflow else ys[i]
    parts = []
    for (end_y, end_x, name), y in zip(ends, ys, strict=True):
        parts.append(
            f'<g class="{_css(name)}"><path class="leader" d="M{end_x + 5:.1f} {end_y:.1f} L{_WIDTH + 8:.1f} {y:.1f}"/>'
            + _text(_WIDTH + 11, y + 3.5, name, 10.5, bold=name == OURS, css="name")
            + "</g>"
        )
    return parts


def _style(names: Sequence[str]) -> str:
    def rules(dark: bool) -> str:
        paper, ink, faint, grid, one = (
            ("#14171c", "#e8e8e8", "#a9afb8", "#2b3038", "#59616c") if dark else ("#ffffff", "#1a1a1a", "#555555", "#e7e7e7", "#b5b5b5")
        )
        lines = "".join(
            f".{_css(name)}{{stroke:{colour};color:{colour}}}"
            for name in names
            for colour in (_INKS.get(name, _OTHER).dark if dark else _INKS.get(name, _OTHER).light,)
        )
        return (
            f".paper{{fill:{paper}}}text{{fill:{ink};stroke:none}}.faint{{fill:{faint}}}"
            f".grid{{stroke:{grid}}}.one{{stroke:{one};stroke-width:1.4}}{lines}"
        )

    fixed = ".mark{fill:currentColor;stroke-width:1.4}.leader{fill:none;stroke-width:0.7;opacity:0.6}.name{fill:currentColor}"
    return f"<style>{fixed}{rules(False)}@media (prefers-color-scheme: dark){{{rules(True)}}}.name{{fill:currentColor}}</style>"


def _css(name: str) -> str:
    return "s-" + "".join(c if c.isalnum() else "-" for c in name)


def _text(x: float, y: float, text: str, size: float, *, bold: bool = False, anchor: str = "start", css: str = "") -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    kind = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"{kind}{weight}{place}>{escape(text)}</text>'

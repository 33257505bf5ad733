"""Panels as an SVG file that every browser shows: no Graphviz, no scripts, no fonts to install."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from fp4compile.report import palette
from fp4compile.report.blocks import Panel, Section
from fp4compile.report.boxes import Box, Kind
from fp4compile.report.layout import Layout, arrange

_FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
# Every font of the list is at most 0.61 em wide, so text measured by its length never leaves its box.
_EM = 0.61
_TITLE, _DETAIL, _SMALL = 12.0, 10.5, 10.0
_PAD, _STRIP, _MARGIN, _FRAME = 9.0, 17.0, 24.0, 16.0
_LONGEST = 44


def svg_text(panels: Sequence[Panel], *, title: str, subtitle: Sequence[str] = ()) -> str:
    """A drawing of `panels` side by side on white, under a title, lines of text and a legend."""
    head, top = _head(panels, title, subtitle)
    bodies, x, bottom = [], _MARGIN, top
    for panel in panels:
        body, width, height = _panel(panel)
        bodies.append(f'<g transform="translate({x:.1f},{top:.1f})">{body}</g>')
        x += width + 2 * _MARGIN
        bottom = max(bottom, top + height)
    legend_width = max([_text_width(line, _DETAIL) for line in subtitle] + [_text_width(title, 16), 620.0])
    width, height = max(x - _MARGIN, legend_width + 2 * _MARGIN), bottom + _MARGIN
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="{_FONT}">'
    )
    arrows = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0.8 L8 4 L0 7.2 z" fill="{colour}"/></marker>'
        for name, colour in (("arrow", palette.EDGE), ("arrow4", palette.EDGE_4BIT))
    )
    paper = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    return "\n".join([opening, f"<defs>{arrows}</defs>", paper, head, *bodies, "</svg>"]) + "\n"


def _head(panels: Sequence[Panel], title: str, subtitle: Sequence[str]) -> tuple[str, float]:
    parts = [_text(_MARGIN, _MARGIN + 12, title, 16, bold=True)]
    y = _MARGIN + 34
    for line in subtitle:
        parts.append(_text(_MARGIN, y, line, _DETAIL, colour="#444444"))
        y += 16
    x = _MARGIN
    for paint in _legend(panels):
        width = _text_width(paint.label, _DETAIL) + 36
        if x > _MARGIN and x + width > 760:
            x, y = _MARGIN, y + 20
        parts.append(f'<rect x="{x:.1f}" y="{y - 4:.1f}" width="16" height="12" rx="3" fill="{paint.fill}" stroke="{paint.line}"/>')
        parts.append(_text(x + 22, y + 6, paint.label, _DETAIL, colour="#444444"))
        x += width
    return "\n".join(parts), y + 40


def _legend(panels: Sequence[Panel]) -> list[palette.Paint]:
    boxes = [box for panel in panels for section in panel.sections for box in section.boxes]
    used = {palette.paint_of(box) for box in boxes if box.kind not in (Kind.INPUT, Kind.OUTPUT)}
    used |= {palette.STORED if box.stored else palette.WEIGHT for box in boxes if box.weight and box.kind is Kind.MATMUL}
    order = (palette.W4A4, palette.W4A16, palette.HIGH, palette.FELL_BACK, palette.QUANTIZE, palette.ROTATE)
    return [p for p in (*order, palette.STORED, palette.WEIGHT, palette.OTHER, palette.SAVED) if p in used]


def _panel(panel: Panel) -> tuple[str, float, float]:
    """Body, width and height of one panel; its frames stick out by a margin that the offset makes room for."""
    names = {box: _lines(box, section) for section in panel.sections for box in section.boxes}
    size = {box: _size(box, lines) for box, lines in names.items()}
    edges = sorted(panel.edges, key=lambda e: (e[0].order, e[1].order))
    layout = arrange([s.boxes for s in panel.sections], edges, size, section_gap=3 * _FRAME)
    frames = [_frame(section, edges, layout, size) for section in panel.sections if section.title]
    entries = _entries(edges, layout, size)
    drawn = [_edge(a, b, layout, size, entries[a, b]) for a, b in edges]
    drawn += [_box(box, lines, layout.center[box], size[box]) for box, lines in names.items()]
    offset = 26.0 if panel.title else 0.0
    first_is_block = bool(panel.sections and panel.sections[0].title)
    shift = offset + (2.4 * _FRAME if first_is_block else 0.0)
    heading = _text(0, 10, panel.title, 14, bold=True) if panel.title else ""
    body = f'{heading}<g transform="translate({_FRAME:.1f},{shift:.1f})">' + "\n".join([*frames, *drawn]) + "</g>"
    return body, layout.width + 2 * _FRAME, layout.height + shift + _FRAME


def _lines(box: Box, section: Section) -> tuple[str, ...]:
    title = re.sub(rf"^{re.escape(section.path)}\.\d+\.", "", box.title) if section.path else box.title
    role = f" {box.role}" if box.role in ("dgrad", "wgrad") else ""
    return (_shortened(title) + role, *box.details)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2 - 1]}..{text[-_LONGEST // 2 + 1 :]}"


def _text_width(text: str, size: float) -> float:
    return len(text) * size * _EM


def _size(box: Box, lines: Sequence[str]) -> tuple[float, float]:
    widths = [_text_width(lines[0], _TITLE), *(_text_width(line, _DETAIL) for line in lines[1:])]
    strip = box.weight if box.kind is Kind.MATMUL else ""
    width = max([*widths, _text_width(strip, _SMALL), 40.0]) + 2 * _PAD
    return width, 2 * _PAD + _TITLE + (len(lines) - 1) * 14 + (_STRIP if strip else 0) - 2


def _box(box: Box, lines: Sequence[str], center: tuple[float, float], size: tuple[float, float]) -> str:
    (x, y), (width, height) = center, size
    left, top = x - width / 2, y - height / 2
    paint = palette.paint_of(box)
    round_ends = box.kind in (Kind.INPUT, Kind.OUTPUT, Kind.SAVED)
    dashes = ' stroke-dasharray="4 3"' if box.kind is Kind.SAVED or box.fell_back else ""
    shape = (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{14 if round_ends else 5}" '
        f'fill="{paint.fill}" stroke="{paint.line}" stroke-width="1.3"{dashes}/>'
    )
    parts = [f"<g><title>{escape(_tooltip(box))}</title>", shape]
    if box.weight and box.kind is Kind.MATMUL:
        strip = palette.STORED if box.stored else palette.WEIGHT
        at = top + height - _STRIP
        parts.append(f'<path d="M{left:.1f} {at:.1f} h{width:.1f} v{_STRIP - 5} a5 5 0 0 1 -5 5 h{-(width - 10):.1f} a5 5 0 0 1 -5 -5 z" '
                     f'fill="{strip.fill}" stroke="{paint.line}" stroke-width="1.3"{dashes}/>')  # fmt: skip
        parts.append(_text(x, at + 12.2, box.weight, _SMALL, anchor="middle", colour="#333333"))
    parts.append(_text(x, top + _PAD + 9.5, lines[0], _TITLE, bold=True, anchor="middle"))
    parts += [_text(x, top + _PAD + 9.5 + 14 * i, line, _DETAIL, anchor="middle", colour="#333333") for i, line in enumerate(lines[1:], 1)]
    return "".join([*parts, "</g>"])


def _tooltip(box: Box) -> str:
    return ", ".join(part for part in (box.module, box.role, box.title, *box.details, box.weight) if part)


def _entries(edges: Iterable[tuple[Box, Box]], layout: Layout[Box], size: dict[Box, tuple[float, float]]) -> dict[tuple[Box, Box], float]:
    """Where each edge enters the box below: side by side, in the order in which they come."""
    coming: dict[Box, list[tuple[Box, Box]]] = {}
    for edge in edges:
        coming.setdefault(edge[1], []).append(edge)
    entries: dict[tuple[Box, Box], float] = {}
    for box, incoming in coming.items():
        incoming.sort(key=lambda e: [layout.center[e[0]], *layout.routes[e]][-1][0])
        step = min(26.0, (size[box][0] - 24) / max(len(incoming), 1))
        for i, edge in enumerate(incoming):
            entries[edge] = layout.center[box][0] + (i - (len(incoming) - 1) / 2) * step
    return entries


def _edge(a: Box, b: Box, layout: Layout[Box], size: dict[Box, tuple[float, float]], entry: float) -> str:
    """Straight down out of a box and into one, curved between the rows, straight past the rows in between."""
    x, y = layout.center[a][0], layout.center[a][1] + size[a][1] / 2
    bottom = layout.rows[layout.row_of[a]][1]
    path = [f"M{x:.1f} {y:.1f} L{x:.1f} {bottom:.1f}"]
    y = bottom
    for row, (bend_x, _) in enumerate(layout.routes[a, b], layout.row_of[a] + 1):
        top, bottom = layout.rows[row]
        path.append(_curve(x, y, bend_x, top) + f" L{bend_x:.1f} {bottom:.1f}")
        x, y = bend_x, bottom
    top = layout.rows[layout.row_of[b]][0]
    end = layout.center[b][1] - size[b][1] / 2
    path.append(_curve(x, y, entry, top - 6) + f" L{entry:.1f} {end - 1:.1f}")
    four = palette.carries_four_bits(a)
    colour, width, arrow = (palette.EDGE_4BIT, 1.9, "arrow4") if four else (palette.EDGE, 1.3, "arrow")
    return f'<path d="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="{width}" marker-end="url(#{arrow})"/>'


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    middle = (y0 + y1) / 2
    return f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"


def _frame(section: Section, edges: Sequence[tuple[Box, Box]], layout: Layout[Box], size: dict[Box, tuple[float, float]]) -> str:
    """Around the boxes of a section and the edges between them."""
    inside = set(section.boxes)
    bends = [x for edge in edges if inside.issuperset(edge) for x, _ in layout.routes[edge]]
    lefts = [layout.center[b][0] - size[b][0] / 2 for b in section.boxes] + bends
    rights = [layout.center[b][0] + size[b][0] / 2 for b in section.boxes] + bends
    rows = [layout.row_of[b] for b in section.boxes]
    left, right = min(lefts) - _FRAME, max(rights) + _FRAME
    top, bottom = layout.rows[min(rows)][0] - 2.2 * _FRAME, layout.rows[max(rows)][1] + _FRAME
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="9" fill="#fbfbf8" '
        f'stroke="#bdbdb2" stroke-dasharray="6 4"/>' + _text(left + 10, top + 17, section.title, _TITLE, bold=True, colour="#666655")
    )


def _text(x: float, y: float, text: str, size: float, *, bold: bool = False, anchor: str = "start", colour: str = "#111111") -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}"{weight}{place}>{escape(text)}</text>'

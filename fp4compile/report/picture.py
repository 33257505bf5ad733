"""A transformed graph for people who would rather look than read: as SVG, and as DOT for tools that lay out graphs themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fp4compile.report import palette
from fp4compile.report.blocks import Panel, panels_of
from fp4compile.report.boxes import Box, Kind, condense
from fp4compile.report.svg import svg_text


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The same picture twice."""

    dot: str
    svg: str


def draw(
    gm: fx.GraphModule,
    *,
    title: str = "transformed graph",
    subtitle: Sequence[str] = (),
    fallbacks: frozenset[tuple[str, str]] = frozenset(),
    parameters: Mapping[int, str] | None = None,
) -> Drawing:
    """Matmuls, quantizers, weights, and what lies between them, with precision as colour; repeated blocks once.

    `subtitle` lines stand under the title. `fallbacks` holds (site name, role) of matmuls to mark as fallen back, `parameters` the names of
    parameters by flat input position: parameters are no inputs of the picture.
    """
    panels = panels_of(condense(gm, fallbacks, parameters))
    return Drawing(dot=_dot_text(panels, title), svg=svg_text(panels, title=title, subtitle=subtitle))


def _dot_text(panels: Sequence[Panel], title: str) -> str:
    lines = [
        "digraph fp4 {",
        f"  label={_quoted(title)}; labelloc=t; fontname=monospace;",
        '  node [shape=box, style="filled,rounded", fontname=monospace];',
    ]
    for p, panel in enumerate(panels):
        for s, section in enumerate(panel.sections):
            boxes = [f"    {_name(p, box)} [{_attributes(box)}];" for box in section.boxes]
            label = section.title or panel.title
            frame = f"    label={_quoted(label)}; style={'dashed' if section.title else 'invis'};"
            lines += [f"  subgraph cluster_{p}_{s} {{", frame, *boxes, "  }"]
        for a, b in sorted(panel.edges, key=lambda e: (e[0].order, e[1].order)):
            colour = palette.EDGE_4BIT if palette.carries_four_bits(a) else palette.EDGE
            lines.append(f"  {_name(p, a)} -> {_name(p, b)} [color={_quoted(colour)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _name(panel: int, box: Box) -> str:
    return f"b{panel}_{box.order}"


def _attributes(box: Box) -> str:
    paint = palette.paint_of(box)
    weight = (box.weight,) if box.weight and box.kind is Kind.MATMUL else ()
    title = f"{box.title} {box.role}" if box.role in ("dgrad", "wgrad") else box.title
    return f"label={_quoted(chr(10).join([title, *box.details, *weight]))}, fillcolor={_quoted(paint.fill)}, color={_quoted(paint.line)}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

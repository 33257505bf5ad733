"""Sensitivity as pictures: bars of each role, raw and per parameter and per FLOP, and lines over the blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from fp4compile.report.chart import COLOURS, Line, Panel, chart_svg, number_text

if TYPE_CHECKING:
    from fp4compile.isolation.result import Row

_FONT: Final = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
_EM: Final = 0.61  # no font of the list is wider
_BAR, _GAP, _WIDE, _VALUE, _MARGIN, _TOP = 12.0, 12.0, 190.0, 66.0, 24.0, 84.0


def blocks_svg(rows: Sequence[Row]) -> str:
    """One line a policy over the blocks: what was measured, and the estimate of the loss."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    own = {policy: [row for row in rows if row.policy == policy and row.kind == "block"] for policy in policies}
    panels = [_lines(own, "one block quantized: loss", "nats a token", "loss")]
    if any(row.kl is not None for row in rows):
        panels.append(_lines(own, "one block quantized: KL to high precision", "nats a token", "kl"))
    if any(row.curvature is not None for row in rows):
        panels.append(_lines(own, "estimate: curvature", "nats a token", "curvature"))
        panels.append(_lines(own, "estimate: first order", "nats a token", "first_order"))
    return chart_svg(panels, title="Sensitivity, block by block", subtitle=("each block quantized alone, the others in high precision",))


def roles_svg(rows: Sequence[Row]) -> str:
    """Bars: one group a role, most sensitive first, one bar a policy; columns for the effect and its two normalisations."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    of = {(row.policy, row.name): row for row in rows if row.kind == "role"}
    roles = sorted({name for _, name in of}, key=lambda name: -max(of[p, name].effect for p in policies if (p, name) in of))
    measured = "KL to high precision" if next(iter(of.values())).kl is not None else "loss"
    columns = (
        (f"{measured}, nats", "effect"),
        ("milli-nats a million parameters", "per_parameter"),
        ("milli-nats a percent of FLOPs", "per_flop"),
    )
    left = _MARGIN + max(len(role) for role in roles) * 11 * _EM + 10
    group = len(policies) * _BAR + _GAP
    width = left + len(columns) * (_WIDE + _VALUE) + _MARGIN
    height = _TOP + len(roles) * group + _MARGIN
    parts = [_text(_MARGIN, 36, "Sensitivity, role by role: one role quantized in all blocks", 16, bold=True), _legend(policies)]
    for i, role in enumerate(roles):
        y = _TOP + i * group
        parts.append(_text(left - 10, y + len(policies) * _BAR / 2 + 4, role, 11, anchor="end"))
    for c, (title, field) in enumerate(columns):
        scale = 1.0 if field == "effect" else 1e3
        values = {key: scale * getattr(row, field) for key, row in of.items()}
        parts.append(_column(left + c * (_WIDE + _VALUE), title, roles, policies, values, group))
    size = f'width="{width:.0f}" height="{height:.0f}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}">'
    return "\n".join([opening, f'<rect {size} fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def _column(x: float, title: str, roles: Sequence[str], policies: Sequence[str], values: dict[tuple[str, str], float], group: float) -> str:
    most = max((value for value in values.values() if math.isfinite(value)), default=0.0)
    parts = [_text(x, _TOP - 10, title, 10.5, colour="#444444")]
    for i, role in enumerate(roles):
        for j, policy in enumerate(policies):
            value, y = values.get((policy, role), math.nan), _TOP + i * group + j * _BAR
            if not math.isfinite(value):
                continue
            long = _WIDE * max(value, 0.0) / most if most > 0 else 0.0
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{long:.1f}" height="{_BAR - 2:.1f}" fill="{COLOURS[j % len(COLOURS)]}"/>')
            parts.append(_text(x + long + 4, y + _BAR - 3.5, number_text(float(f"{value:.2g}")), 9.5, colour="#444444"))
    return "".join(parts)


def _legend(policies: Sequence[str]) -> str:
    parts, x = [], _MARGIN
    for j, policy in enumerate(policies):
        parts.append(f'<rect x="{x:.1f}" y="48" width="18" height="10" fill="{COLOURS[j % len(COLOURS)]}"/>')
        parts.append(_text(x + 24, 57, policy, 10.5, colour="#444444"))
        x += len(policy) * 10.5 * _EM + 44
    return "".join(parts)


def _lines(own: dict[str, list[Row]], title: str, unit: str, field: str) -> Panel:
    lines = []
    for policy, rows in own.items():
        points = [(float(i), value) for i, row in enumerate(rows) if (value := getattr(row, field)) is not None]
        lines.append(Line(label=policy, points=tuple(points)))
    return Panel(title=title, x="block", y=unit, lines=tuple(lines))


def _text(x: float, y: float, text: str, size: float, *, bold: bool = False, anchor: str = "start", colour: str = "#111111") -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}"{weight}{place}>{escape(text)}</text>'

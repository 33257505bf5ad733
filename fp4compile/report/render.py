"""Reports as text: a few lines that say it all, then the table that says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tabulate import tabulate

from fp4compile.passes.record import GraphRecord, SiteDecision
from fp4compile.report.coverage import coverage_of, is_quantized, share_of
from fp4compile.report.folding import Folded, fold, unfolded, without_role

_COLUMNS = ("matmul", "role", "M", "N", "K", "precision", "kernel", "because")
_ALIGN = ("left", "left", "right", "right", "right", "left", "left", "left")
_NOTHING = (
    'No graph compiled with backend="fp4" yet: call the compiled model once, or use fp4compile.explain(model, *args). '
    "If that was done, Dynamo captured no graph and the model ran as it is: TORCH_LOGS=graph_breaks says why."
)


def as_text(graphs: Sequence[GraphRecord], *, folded: bool) -> str:
    """For a terminal: header lines and a table a graph."""
    blocks = []
    for graph in graphs:
        first, *rest = header_lines(graph)
        blocks.append("\n".join([first, *(f"  {line}" for line in rest), "", _table(graph.sites, folded, "simple")]).rstrip())
    return "\n\n".join(blocks) if blocks else _NOTHING


def as_markdown(graphs: Sequence[GraphRecord], *, folded: bool, stable: bool) -> str:
    """The same as sections of a Markdown document. `stable` leaves out what differs between two runs."""
    blocks = []
    for graph in graphs:
        first, *rest = header_lines(graph, stable=stable)
        blocks.append("\n".join([f"## {first}", "", *(f"- {line}" for line in rest), "", _table(graph.sites, folded, "pipe")]).rstrip())
    return ("\n\n".join(blocks) if blocks else _NOTHING) + "\n"


def header_lines(graph: GraphRecord, *, stable: bool = False) -> list[str]:
    """What was compiled; how much got 4 bits; what it saved; what did not get 4 bits and why."""
    lines = [f"graph {graph.id}: {'training' if graph.training else 'inference'} on {graph.target}, policy {graph.policy}"]
    if not graph.sites:
        return [*lines, "no matmul in this graph: nothing to do"]
    cover = coverage_of([graph])
    counts = f"{cover.sites} matmuls: {cover.quantized} quantized, {cover.kept} kept, {cover.fallen_back} fell back"
    lines.append(counts + _shares(cover.flops_share, cover.weight_share))
    lines += [line for line in (_savings(graph), _saved(graph), "" if stable else _time(graph)) if line]
    lines += _causes("kept", graph, lambda row: not is_quantized(row) and not row.fallback)
    lines += _causes("fell back", graph, lambda row: row.fallback)
    return [*lines, f"dump in {graph.dump}"] if graph.dump and not stable else lines


def _savings(graph: GraphRecord) -> str:
    cover = coverage_of([graph])
    parts = []
    if cover.bytes_before:
        ratio = cover.bytes_before / max(cover.bytes_after, 1)
        parts.append(f"matmul weights {byte_text(cover.bytes_before)} -> {byte_text(cover.bytes_after)} ({ratio:.2f}x smaller)")
    if graph.freed_bytes:
        parts.append(f"originals of {byte_text(graph.freed_bytes)} freed")
    if graph.shared:
        parts.append(f"{graph.shared} quantizations shared")
    return ", ".join(parts)


def _saved(graph: GraphRecord) -> str:
    if not graph.saved_code_bytes:
        return f"saved for backward: {byte_text(graph.saved_bytes)}" if graph.saved_bytes else ""
    instead = graph.saved_bytes_without - graph.saved_bytes + graph.saved_code_bytes
    codes = f"{byte_text(graph.saved_code_bytes)} of it codes in place of {byte_text(instead)}"
    return f"saved for backward: {byte_text(graph.saved_bytes)}, {codes} (without them {byte_text(graph.saved_bytes_without)})"


def _time(graph: GraphRecord) -> str:
    return f"{len(graph.passes)} passes in {sum(p.milliseconds for p in graph.passes):.0f} ms" if graph.passes else ""


def _causes(verdict: str, graph: GraphRecord, concerned: Callable[[SiteDecision], bool]) -> list[str]:
    """In training with shares: what pretraining keeps in high precision is a number that recipes state."""
    causes: dict[tuple[str, str], list[SiteDecision]] = {}
    for row in filter(concerned, graph.sites):
        causes.setdefault((row.precision, row.reason or "no reason given"), []).append(row)
    lines = []
    for (precision, reason), found in sorted(causes.items(), key=lambda item: -len(item[1])):
        shares = _shares(*share_of(found, graph.sites)) if graph.training else ""
        lines.append(f"{verdict} in {precision}: {len(found)} x {reason}{shares}")
    return lines


def _shares(flops: float | None, weights: float | None) -> str:
    # Rounded down, so that 100% is said of everything and of nothing less.
    known = ((flops, "operations"), (weights, "weight bytes"))
    shares = [f"{math.floor(1000 * share) / 10}% of {what}" for share, what in known if share is not None]
    return f" ({', '.join(shares)})" if shares else ""


def _table(rows: Sequence[SiteDecision], folded: bool, style: str) -> str:
    if not rows:
        return ""
    cells = [_cells(each) for each in (fold(rows) if folded else unfolded(rows))]
    return tabulate(cells, headers=_COLUMNS, tablefmt=style, disable_numparse=True, colalign=_ALIGN)


def _cells(folded: Folded) -> tuple[str, ...]:
    row = folded.row
    name = f"{folded.name} x{folded.count}" if folded.count > 1 else folded.name
    rule = without_role(row.rule) if len(folded.roles) > 1 else row.rule
    # What the policy says of everything needs no words of its own: the rule is the reason.
    reason = "" if row.reason.startswith("default of ") else f"FELL BACK: {row.reason}" if row.fallback else row.reason
    because = f"{reason} ({rule})" if rule and reason else reason or rule
    k = f"{row.k}+{row.extra_k}" if row.extra_k else row.k if row.k != "0" else ""
    precision = f"{row.precision}: {row.operands}" if row.operands else row.precision
    return name, " ".join(folded.roles), row.m, row.n, k, precision, row.kernel, because


def byte_text(count: int) -> str:
    """`346 MB`: three digits and a decimal unit."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"

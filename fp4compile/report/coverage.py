"""How much of a model got 4 bits: counts, and shares of operations and of weight bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sympy

from fp4compile.passes.record import GraphRecord, SiteDecision


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Matmuls by what became of them. Shares lie in 0..1, and are None where nothing is known to divide by."""

    sites: int
    quantized: int
    kept: int  # left alone as the policy says
    fallen_back: int  # could not follow the policy; those of `quantized` among them read other values than it says
    flops_share: float | None  # of the operations of matmuls with known sizes
    weight_share: float | None  # of the bytes of matmul weights, before
    bytes_before: int  # of matmul weights in their own dtype
    bytes_after: int  # the same weights as compiled code reads them


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """One cause for which matmuls could not follow the policy, and their names."""

    reason: str
    count: int
    sites: tuple[str, ...]


def is_quantized(row: SiteDecision) -> bool:
    return "W4" in row.precision


def coverage_of(graphs: Iterable[GraphRecord]) -> Coverage:
    """Coverage over all graphs. Weights that recompilations of one frame share are counted once."""
    graphs = list(graphs)
    rows = [row for graph in graphs for row in graph.sites]
    weights = {(graph.id.split("/")[0], row.name): row for graph in graphs for row in graph.sites if row.bytes_before}
    before = sum(row.bytes_before for row in weights.values())
    in_four_bits = sum(row.bytes_before for row in weights.values() if is_quantized(row))
    quantized, fallen = sum(map(is_quantized, rows)), sum(row.fallback for row in rows)
    kept = sum(not is_quantized(row) and not row.fallback for row in rows)
    return Coverage(
        sites=len(rows),
        quantized=quantized,
        kept=kept,
        fallen_back=fallen,
        flops_share=_flops_share(rows, is_quantized),
        weight_share=in_four_bits / before if before else None,
        bytes_before=before,
        bytes_after=sum(row.bytes_after for row in weights.values()),
    )


def share_of(rows: Sequence[SiteDecision], among: Sequence[SiteDecision]) -> tuple[float | None, float | None]:
    """Shares of `rows` in the operations and in the weight bytes of `among`; None where nothing is known to divide by."""
    weights = sum(row.bytes_before for row in among)
    share = sum(row.bytes_before for row in rows) / weights if weights else None
    part = {id(row) for row in rows}
    return _flops_share(among, lambda row: id(row) in part), share


def fallbacks_of(graphs: Iterable[GraphRecord]) -> tuple[Fallback, ...]:
    """Fallbacks grouped by reason, the most frequent first."""
    names: dict[str, list[str]] = {}
    for graph in graphs:
        for row in graph.sites:
            if row.fallback:
                names.setdefault(row.reason, []).append(row.name)
    found = [Fallback(reason=reason, count=len(sites), sites=tuple(dict.fromkeys(sites))) for reason, sites in names.items()]
    return tuple(sorted(found, key=lambda f: -f.count))


def _flops_share(rows: Sequence[SiteDecision], counts: Callable[[SiteDecision], bool]) -> float | None:
    """Symbolic sizes cancel where all matmuls have them in common, as the number of tokens does in a model without attention's own."""
    flops = [(row, flops_of(row)) for row in rows]
    known = [(row, count) for row, count in flops if count is not None]
    total = sum(count for _, count in known)
    if not total:
        return None
    share = sympy.cancel(sum(count for row, count in known if counts(row)) / sympy.sympify(total))
    return float(share) if share.is_number else None


def flops_of(row: SiteDecision) -> sympy.Expr | None:
    """2 * M * N * K, or None where a size is not known or is no plain product of symbols."""
    sizes = [size for text in (row.m, row.n, row.k) if (size := _size(text)) is not None and size != 0]
    return sympy.Mul(2, *sizes) if len(sizes) == 3 else None


def _size(text: str) -> sympy.Expr | None:
    factors = text.split("*")
    if not all(factor.isidentifier() or factor.isdecimal() for factor in factors):
        return None
    return sympy.Mul(*(sympy.Integer(f) if f.isdecimal() else sympy.Symbol(f, positive=True, integer=True) for f in factors))

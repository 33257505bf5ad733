"""Places for the boxes of a layered drawing: rows from dependencies, order within a row by few crossings, then straight edges.

The method of Sugiyama, Tagawa and Toda (1981), with barycenters for the order and for the positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
_SWEEPS = 24


@dataclass(frozen=True, kw_only=True)
class Layout(Generic[T]):
    """`center` of each box and `routes`, the points of each edge between its ends, in pixels. Row r spans `rows[r]`, top to bottom."""

    center: Mapping[T, tuple[float, float]]
    routes: Mapping[tuple[T, T], tuple[tuple[float, float], ...]]
    rows: tuple[tuple[float, float], ...]
    row_of: Mapping[T, int]
    width: float
    height: float


@dataclass(frozen=True)
class _Bend:
    """Where an edge passes through a row that it has no end in."""

    edge: tuple[Hashable, Hashable]
    row: int


def arrange(
    sections: Sequence[Sequence[T]],
    edges: Sequence[tuple[T, T]],
    size: Mapping[T, tuple[float, float]],
    *,
    gap: tuple[float, float] = (22.0, 34.0),
    section_gap: float = 30.0,
) -> Layout[T]:
    """Lay out boxes of `size` (width, height), every section below the one before, so that edges lead downwards."""
    row_of = _rows(sections, edges)
    count = 1 + max(row_of.values(), default=-1)
    rows: list[list[Hashable]] = [[] for _ in range(count)]
    for section in sections:
        for box in section:
            rows[row_of[box]].append(box)
    links, chains = _chains(rows, edges, row_of)
    _order(rows, links)
    x = _positions(rows, links, size, gap[0])
    first_rows = {min(row_of[b] for b in s) for s in sections if s}
    spans, height = _row_spans(rows, size, gap[1], section_gap, first_rows)
    left = min((x[n] - _width(n, size) / 2 for row in rows for n in row), default=0.0)
    width = max((x[n] + _width(n, size) / 2 for row in rows for n in row), default=0.0) - left
    middle = [(top + bottom) / 2 for top, bottom in spans]
    return Layout(
        center={b: (x[b] - left, middle[r]) for b, r in row_of.items()},
        routes={e: tuple((x[bend] - left, middle[bend.row]) for bend in bends) for e, bends in chains.items()},
        rows=tuple(spans),
        row_of=row_of,
        width=width,
        height=height,
    )


def _rows(sections: Sequence[Sequence[T]], edges: Sequence[tuple[T, T]]) -> dict[T, int]:
    """Longest path from the top of the section; boxes that read nothing move down to what reads them."""
    reads: dict[T, list[T]] = {}
    readers: dict[T, list[T]] = {}
    for a, b in edges:
        reads.setdefault(b, []).append(a)
        readers.setdefault(a, []).append(b)
    row: dict[T, int] = {}
    start = 0
    for section in sections:
        for box in section:  # in topological order
            row[box] = max((row[a] + 1 for a in reads.get(box, ()) if a in row), default=start)
            row[box] = max(row[box], start)
        for box in reversed(section):
            if box not in reads:
                row[box] = min((row[b] for b in readers.get(box, ()) if b in row), default=row[box] + 1) - 1
        shift = start - min((row[b] for b in section), default=start)
        for box in section:
            row[box] += max(shift, 0)
        start = 1 + max((row[b] for b in section), default=start - 1)
    return row


def _chains(
    rows: list[list[Hashable]], edges: Sequence[tuple[T, T]], row_of: Mapping[T, int]
) -> tuple[list[tuple[Hashable, Hashable]], dict[tuple[T, T], list[_Bend]]]:
    """Put a bend into every row that an edge crosses; return links between neighbouring rows, and the bends of each edge."""
    links: list[tuple[Hashable, Hashable]] = []
    chains: dict[tuple[T, T], list[_Bend]] = {}
    for edge in edges:
        bends = [_Bend(edge, r) for r in range(row_of[edge[0]] + 1, row_of[edge[1]])]
        for bend in bends:
            rows[bend.row].append(bend)
        chains[edge] = bends
        path = [edge[0], *bends, edge[1]]
        links += pairwise(path)
    return links, chains


def _neighbours(links: Sequence[tuple[Hashable, Hashable]]) -> tuple[dict[Hashable, list[Hashable]], dict[Hashable, list[Hashable]]]:
    above: dict[Hashable, list[Hashable]] = {}
    below: dict[Hashable, list[Hashable]] = {}
    for a, b in links:
        below.setdefault(a, []).append(b)
        above.setdefault(b, []).append(a)
    return above, below


def _order(rows: list[list[Hashable]], links: Sequence[tuple[Hashable, Hashable]]) -> None:
    """Sort rows, down and up in turn, by the mean place of the neighbours in the row before; keep the order with fewest crossings."""
    above, below = _neighbours(links)
    best, fewest = [list(r) for r in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        for r in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            means = _means(rows[r], rows[r - 1] if down else rows[r + 1], near)
            rows[r].sort(key=means.__getitem__)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(r) for r in rows], crossings
    rows[:] = best


def _means(row: list[Hashable], other: list[Hashable], near: Mapping[Hashable, list[Hashable]]) -> dict[Hashable, float]:
    """Mean place in the `other` row of what each node of `row` is linked to; its own place, scaled, where it is linked to nothing."""
    place = {n: i for i, n in enumerate(other)}
    scale = max(len(other), 1) / max(len(row), 1)
    means: dict[Hashable, float] = {}
    for i, n in enumerate(row):
        linked = [place[m] for m in near.get(n, ())]
        means[n] = sum(linked) / len(linked) if linked else i * scale
    return means


def _crossings(rows: list[list[Hashable]], below: Mapping[Hashable, list[Hashable]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        place = {n: i for i, n in enumerate(lower)}
        ends = [e for n in upper for e in sorted(place[m] for m in below.get(n, ()))]
        total += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return total


def _positions(
    rows: list[list[Hashable]], links: Sequence[tuple[Hashable, Hashable]], size: Mapping[T, tuple[float, float]], gap: float
) -> dict[Hashable, float]:
    """Pull every box towards the mean of its neighbours, bends hardest, and push overlapping ones apart."""
    above, below = _neighbours(links)
    x: dict[Hashable, float] = {}
    for row in rows:
        x.update(_packed(row, dict.fromkeys(row, 0.0), size, gap))
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = {n: (above if down else below).get(n) or (below if down else above).get(n) or [n] for n in row}
            wanted = {n: sum(x[m] for m in near[n]) / len(near[n]) for n in row}
            x.update(_packed(row, wanted, size, gap))
    return x


def _packed(
    row: list[Hashable], wanted: Mapping[Hashable, float], size: Mapping[T, tuple[float, float]], gap: float
) -> dict[Hashable, float]:
    """Nearest places (least squares) to the wanted ones that keep order and distance: pool adjacent violators."""
    offset, at = [], 0.0
    for i, n in enumerate(row):
        if i:
            at += (_width(row[i - 1], size) + _width(n, size)) / 2 + gap
        offset.append(at)
    pools: list[list[float]] = []  # sum of wanted shifts, weight, number of boxes
    for n, o in zip(row, offset, strict=True):
        weight = 4.0 if isinstance(n, _Bend) else 1.0
        pools.append([(wanted[n] - o) * weight, weight, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    shifts = [pool[0] / pool[1] for pool in pools for _ in range(int(pool[2]))]
    return {n: o + s for n, o, s in zip(row, offset, shifts, strict=True)}


def _width(n: Hashable, size: Mapping[T, tuple[float, float]]) -> float:
    return 8.0 if isinstance(n, _Bend) else size[n][0]  # type: ignore[index]


def _row_spans(
    rows: list[list[Hashable]], size: Mapping[T, tuple[float, float]], gap: float, section_gap: float, first_rows: set[int]
) -> tuple[list[tuple[float, float]], float]:
    spans: list[tuple[float, float]] = []
    y = 0.0
    for r, row in enumerate(rows):
        y += section_gap if r in first_rows and r else 0.0
        height = max((size[n][1] for n in row if not isinstance(n, _Bend)), default=0.0)  # type: ignore[index]
        spans.append((y, y + height))
        y += height + gap
    return spans, max(y - gap, 0.0)

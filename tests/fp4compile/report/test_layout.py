"""Whatever the graph, a layout keeps boxes apart and arrows pointing down."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from fp4compile.report.layout import Layout, arrange

Drawing = tuple[list[list[int]], list[tuple[int, int]], dict[int, tuple[float, float]]]


@st.composite
def drawings(draw: st.DrawFn) -> Drawing:
    """A random acyclic graph cut into sections: edges lead from lower numbers to higher ones."""
    count = draw(st.integers(1, 14))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=24)) if pairs else []
    cut = draw(st.integers(0, count))
    size = {b: (draw(st.sampled_from([30.0, 80.0, 200.0])), draw(st.sampled_from([20.0, 60.0]))) for b in range(count)}
    return [s for s in (list(range(cut)), list(range(cut, count))) if s], edges, size


@given(drawings())
def test_boxes_stay_apart_and_arrows_point_down(drawing: Drawing) -> None:
    sections, edges, size = drawing
    layout = arrange(sections, edges, size, gap=(22.0, 34.0))
    boxes = [b for s in sections for b in s]
    for a, b in combinations(boxes, 2):
        assert apart(layout, size, a, b), (a, b)
    for a, b in edges:
        assert layout.row_of[a] < layout.row_of[b]
        assert layout.center[a][1] < layout.center[b][1]
        assert len(layout.routes[a, b]) == layout.row_of[b] - layout.row_of[a] - 1
    for upper, lower in pairwise(sections):
        assert max(layout.row_of[b] for b in upper) < min(layout.row_of[b] for b in lower)
    for b in boxes:
        (x, y), (w, h) = layout.center[b], size[b]
        assert x - w / 2 >= -1e-6
        assert x + w / 2 <= layout.width + 1e-6
        assert y - h / 2 >= -1e-6
        assert y + h / 2 <= layout.height + 1e-6


def apart(layout: Layout[int], size: dict[int, tuple[float, float]], a: int, b: int) -> bool:
    (ax, ay), (bx, by) = layout.center[a], layout.center[b]
    return abs(ax - bx) >= (size[a][0] + size[b][0]) / 2 + 21.9 or abs(ay - by) >= (size[a][1] + size[b][1]) / 2 + 9.9


@given(drawings())
def test_edges_pass_between_boxes(drawing: Drawing) -> None:
    """In a row that an edge only crosses, it crosses where no box is."""
    sections, edges, size = drawing
    layout = arrange(sections, edges, size)
    for (a, _), route in layout.routes.items():
        for row, (x, _) in enumerate(route, layout.row_of[a] + 1):
            for box, at in layout.row_of.items():
                if at == row:
                    assert abs(layout.center[box][0] - x) >= size[box][0] / 2 + 20


def test_a_chain_is_straight_and_a_diamond_symmetric() -> None:
    size = dict.fromkeys(range(4), (40.0, 20.0))
    chain = arrange([[0, 1, 2]], [(0, 1), (1, 2)], size)
    assert len({x for x, _ in chain.center.values()}) == 1
    diamond = arrange([[0, 1, 2, 3]], [(0, 1), (0, 2), (1, 3), (2, 3)], size)
    assert abs(diamond.center[1][0] + diamond.center[2][0] - 2 * diamond.center[0][0]) < 1
    assert abs(diamond.center[0][0] - diamond.center[3][0]) < 1

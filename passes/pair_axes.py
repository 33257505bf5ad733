"""Quantize a value along its rows and along its columns in one reading.

    q = fp4.quantize(x, axis=-1); t = fp4.quantize(x, axis=-2)  ->  q, t = fp4.quantize_both(x)

Training reads an activation along its features in the forward and along its tokens in wgrad, and a gradient likewise in dgrad and wgrad.
A pair runs where the first half is needed, so an activation's second half is kept as codes until the backward.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call
from fp4compile.passes.site import constant_of

_ROW, _COLUMN = -1, -2


@dataclass(frozen=True)
class PairAxes(Pass):
    """Needs: quantize nodes in their final form. Leaves: no value that is quantized once along each axis by two nodes.

    Weights are quantized apart: each copy is an entry of the weight store. So is what a checkpoint recomputes: in the forward it would
    compute the half that only the backward reads, and throw it away.
    """

    name: ClassVar[str] = "pair-axes"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        by_source: dict[Any, dict[int, list[fx.Node]]] = {}
        for node in gm.graph.find_nodes(op="call_function", target=ops.QUANTIZE):
            if _may_pair(node):
                source, axis = node.args[:2]
                by_source.setdefault(source, {_ROW: [], _COLUMN: []})[axis].append(node)  # type: ignore[index]
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        pairs = [(sides[_ROW][0], sides[_COLUMN][0]) for sides in by_source.values() if sides[_ROW] and sides[_COLUMN]]
        for row, column in pairs:
            _pair(row, column, order)
        return PassResult(changed=len(pairs), notes=(f"{len(pairs)} values are quantized along both axes in one reading",))


def _may_pair(node: fx.Node) -> bool:
    arguments: tuple[Any, ...] = node.args
    _, _, *fields, _ = arguments
    return constant_of(node) is None and "recompute" not in node.meta and not ops.config_of(*fields).is_offline


def _pair(row: fx.Node, column: fx.Node, order: dict[fx.Node, int]) -> None:
    graph = row.graph
    first = min(row, column, key=order.__getitem__)
    source, _, *row_fields, row_seed = row.args
    _, _, *column_fields, column_seed = column.args
    for seed in (row_seed, column_seed):
        if isinstance(seed, fx.Node) and order[seed] > order[first]:
            first.prepend(seed)  # a seed is one element of the graph's draw, which stands in front of every quantize node
    layouts = {f"{name}_layout": node.kwargs.get("layout", "plain") for name, node in (("row", row), ("column", column))}
    with graph.inserting_before(first):
        both = call(graph, ops.QUANTIZE_BOTH, (source, *row_fields, *column_fields, row_seed, column_seed), layouts, like=row)
    both.meta["partitioner_tag"] = first.meta.get("partitioner_tag")
    for half, offset in ((row, 0), (column, 3)):
        for part in list(half.users):
            assert part.target is operator.getitem, "a quantize node is read by its results alone"
            part.args = (both, part.args[1] + offset)  # type: ignore[operator]
        graph.erase_node(half)

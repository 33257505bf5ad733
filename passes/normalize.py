"""Bring the graph into the form that later passes match.

addmm(c, a, b, beta=2, alpha=3)  ->  3 * mm(a, b) + 2 * c          (a plain addmm with a vector bias stays)
view(x, s), view(x, s)           ->  view(x, s)                    (views, permutes and casts of one value are one node)

What depends on a gradient is marked as backward: Dynamo leaves the mark out where it traced an autograd function of the model's own.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call
from fp4compile.passes.match import computed_from_gradients
from fp4compile.passes.site import fake_of, is_backward

aten = torch.ops.aten

_VIEW_LIKE = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}


@dataclass(frozen=True)
class Normalize(Pass):
    """Needs: a functional aten graph. Leaves: every matmul as mm, addmm with a vector bias, bmm or _grouped_mm; equal views merged."""

    name: ClassVar[str] = "normalize"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        marked = _mark_backward(gm.graph)
        split = sum(_split_sum(node) for node in list(gm.graph.nodes))
        merged = merge_equal(gm.graph, _VIEW_LIKE)
        notes = (f"{split} sums split from their matmul", f"{merged} repeated views merged")
        return PassResult(changed=marked + split + merged, notes=(*notes, f"{marked} nodes marked as backward") if marked else notes)


def _mark_backward(graph: fx.Graph) -> int:
    unmarked = [n for n in computed_from_gradients(graph) if n.op == "call_function" and "partitioner_tag" not in n.meta]
    for node in unmarked:
        node.meta["partitioner_tag"] = "is_backward"
    return len(unmarked)


def _split_sum(node: fx.Node) -> int:
    """addmm or baddbmm that is more than a product plus a vector becomes the product, and the sum around it."""
    if node.target not in (aten.addmm.default, aten.baddbmm.default):
        return 0
    bias, a, b = node.args
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if node.target is aten.addmm.default and beta == 1 and alpha == 1 and _is_vector(fake_of(bias), fake_of(node).shape[-1]):  # type: ignore[arg-type]
        return 0
    product = aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
    with node.graph.inserting_before(node):
        value = call(node.graph, product, (a, b), like=node)
        if alpha != 1:
            value = call(node.graph, aten.mul.Tensor, (value, alpha), like=node)
        if beta != 0:
            term = bias if beta == 1 else call(node.graph, aten.mul.Tensor, (bias, beta), like=node)
            value = call(node.graph, aten.add.Tensor, (value, term), like=node)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    return 1


def _is_vector(bias: torch.Tensor, length: int | torch.SymInt) -> bool:
    """Kernels read one bias a column: a single one for all of them is added outside."""
    return bias.ndim == 1 and statically_known_true(bias.shape[0] == length)


def merge_equal(graph: fx.Graph, targets: Container[object]) -> int:
    """Replace each later node that applies the same function of `targets` to the same arguments by the first one."""
    first: dict[object, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in targets:
            continue
        key = (node.target, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items()))))
        kept = first.setdefault(key, node)
        # A forward node must not read a backward one, or the graph could not be cut in two.
        if kept is not node and (is_backward(node) or not is_backward(kept)):
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            merged += 1
    return merged


def _hashable(value: object) -> object:
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value

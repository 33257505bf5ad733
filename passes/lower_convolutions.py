"""Write a planned convolution as the matmul that it is.

    convolution(x, W, stride = kernel)  ->  view(addmm(bias, patches(x), W.view(N, C k k).T))

1x1 convolutions and patch embeddings: the kernel tiles the input without overlap, so patches are a reordering and nothing is copied twice.
In training the backward keeps `convolution_backward`, which reads the original operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import fx

from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call
from fp4compile.passes.site import fake_of, plan_of, set_plan, set_site, site_of

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerConvolutions(Pass):
    """Needs: plans. Leaves: no convolution that is to be quantized; its site and plan ride on the mm or addmm."""

    name: ClassVar[str] = "lower-convolutions"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        planned = [
            n for n in gm.graph.nodes if n.target is aten.convolution.default and (plan := plan_of(n)) is not None and plan.quantizes
        ]
        for node in planned:
            _lower(node)
        return PassResult(changed=len(planned))


def why_not_a_matmul(node: fx.Node) -> str:
    """Empty where the convolution `node` is a matmul of non-overlapping patches; otherwise what it is instead."""
    x, w = fake_of(node.args[0]), fake_of(node.args[1])  # type: ignore[arg-type]
    _, _, _, stride, padding, dilation, transposed, _, groups = node.args
    kernel = list(w.shape[2:])
    if transposed:
        return "a transposed convolution is not a matmul"
    if groups != 1:
        return f"a convolution in {groups} groups is not one matmul"
    if _all(stride, len(kernel)) != kernel or any(padding) or any(d != 1 for d in dilation):  # type: ignore[union-attr, arg-type]
        shape = "x".join(map(str, kernel))
        return f"the patches of this {shape} convolution overlap or are padded: it is not a matmul of two matrices"
    if not all(isinstance(s, int) and s % k == 0 for s, k in zip(x.shape[2:], kernel, strict=True)):
        return "the kernel does not tile the input, or the input's size is not static"
    return ""


def _lower(node: fx.Node) -> None:
    site, plan = site_of(node), plan_of(node)
    assert site is not None and plan is not None and site.lhs is not None and site.rhs is not None
    x, w, bias = node.args[:3]
    with node.graph.inserting_before(node):
        patches = _patches(node, x, fake_of(w).shape[2:])  # type: ignore[arg-type]
        flat = call(node.graph, aten.view.default, (w, [fake_of(w).shape[0], -1]), like=node, tag=w.meta.get("partitioner_tag"))  # type: ignore[arg-type, union-attr]
        right = call(node.graph, aten.permute.default, (flat, [1, 0]), like=node)
        if bias is None:
            product = call(node.graph, aten.mm.default, (patches, right), like=node)
        else:
            product = call(node.graph, aten.addmm.default, (bias, patches, right), like=node)
        out = fake_of(node).shape
        last = call(node.graph, aten.view.default, (product, [-1, *out[2:], out[1]]), like=node)
        result = call(node.graph, aten.permute.default, (last, [0, len(out) - 1, *range(1, len(out) - 1)]), like=node)
    set_site(product, replace(site, lhs=replace(site.lhs, source=patches), rhs=replace(site.rhs, source=flat)))
    set_plan(product, plan)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _patches(node: fx.Node, x: fx.Node, kernel: Sequence[int]) -> fx.Node:
    """(B, C, H, W) to (B H/k W/k, C k k), element order as in `W.view(N, -1)`."""
    channels, *spatial = fake_of(x).shape[1:]
    dims = len(kernel)
    split = [extent for s, k in zip(spatial, kernel, strict=True) for extent in (s // k, k)]
    order = [0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)]
    tiled = call(node.graph, aten.view.default, (x, [-1, channels, *split]), like=node)
    moved = call(node.graph, aten.permute.default, (tiled, order), like=node)
    dense = call(node.graph, aten.clone.default, (moved,), {"memory_format": torch.contiguous_format}, like=node)
    return call(node.graph, aten.view.default, (dense, [-1, channels * prod(kernel)]), like=node)


def _all(value: Sequence[int], count: int) -> list[int]:
    return list(value) * count if len(value) == 1 else list(value)

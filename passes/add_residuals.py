"""Quantize calibrated outlier channels a second time, for what the first time lost (ARCQuant, arXiv 2601.07475).

    scaled_mm(quantize(x), quantize(W), k=K)
        ->  scaled_mm(quantize_residual(x, order, S), quantize_repeated(W, order, S), k=K + S)

The order is a constant of the graph and the gather part of the quantize kernel, so it takes no pass over x. A norm that makes x would only
take the gather over: it reads the residual stream in the model's own order.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import round_up
from fp4compile.codegen.outliers import Outliers
from fp4compile.codegen.residual_ops import QUANTIZE_REPEATED, QUANTIZE_RESIDUAL
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call
from fp4compile.passes.site import OperandKind, fake_of, is_order, plan_of, set_order, site_of

_K = 7  # the argument of a product that says how long its contraction is
_CODES = (0, 3)  # those of its left and right codes


@dataclass(frozen=True)
class AddResiduals(Pass):
    """Needs: quantize nodes, each with one reader. Leaves: plans with outliers carried out, in products that are wider by those."""

    name: ClassVar[str] = "add-residuals"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        planned = [node for node in gm.graph.nodes if (plan := plan_of(node)) is not None and plan.outliers is not None]
        widened = sum(_widen(gm, node) for node in planned)
        return PassResult(changed=widened, notes=(f"{widened} products are wider by the residuals of outliers",) if widened else ())


def _widen(gm: fx.GraphModule, product: fx.Node) -> int:
    site, plan = site_of(product), plan_of(product)
    assert site is not None and plan is not None and plan.outliers is not None and site.lhs is not None and site.rhs is not None
    quantized = [_quantize_node(product, side) for side in _CODES]
    if any(node.target is not ops.QUANTIZE for node in quantized):
        return 0
    for operand, node in zip((site.lhs, site.rhs), quantized, strict=True):
        _replace(gm, node, operand.kind, plan.outliers)
    config = plan.lhs
    assert config is not None and isinstance(site.k, int)
    product.update_arg(_K, round_up(site.k, config.fmt.block) + plan.outliers.count)
    return 1


def _quantize_node(product: fx.Node, position: int) -> fx.Node:
    codes: Any = product.args[position]
    assert codes.target is operator.getitem
    return codes.args[0]


def _replace(gm: fx.GraphModule, node: fx.Node, kind: OperandKind, outliers: Outliers) -> None:
    arguments: Any = node.args
    source, axis, *fields, seed = arguments
    order = _order_node(gm, fake_of(source), outliers)
    target = QUANTIZE_REPEATED if kind is OperandKind.WEIGHT else QUANTIZE_RESIDUAL
    assert seed is None, "the forward of inference draws nothing"
    with gm.graph.inserting_after(node):
        wide = call(gm.graph, target, (source, axis, order, outliers.count, *fields), node.kwargs, like=node)
    for part in list(node.users):
        assert part.target is operator.getitem
        part.args = (wide, part.args[1])
        part.meta["val"] = wide.meta["val"][part.args[1]]  # type: ignore[index]
    gm.graph.erase_node(node)


def _order_node(gm: fx.GraphModule, value: torch.Tensor, outliers: Outliers) -> fx.Node:
    """The one node that reads this order on this device, in front of everything but inputs.

    Its name says its content: a weight in the weight store is known by the text of what computes it.
    """
    device = value.device
    name = f"order_{outliers.digest[:16]}_{device.type}{'' if device.index is None else device.index}"
    known = next((n for n in gm.graph.nodes if n.op == "get_attr" and is_order(n) and n.target == name), None)
    if known is not None:
        return known
    order = outliers.order.to(device)
    gm.register_buffer(name, order)
    last_input = [n for n in gm.graph.nodes if n.op == "placeholder"][-1]
    with gm.graph.inserting_after(last_input):
        node = gm.graph.create_node("get_attr", name)
    node.meta["val"] = value.fake_mode.from_tensor(order)  # type: ignore[attr-defined]
    set_order(node)
    return node

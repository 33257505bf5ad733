"""Rotate the operands that the plan wants rotated.

    mm(a, b)  ->  mm(a, b), planned to read fp4.hadamard(a) and fp4.hadamard(b)

Both operands of a matmul are rotated along its contraction dimension, so that the rotation cancels inside the product. Random signs are
one more product in front of the rotation, with ones and minus ones that both operands share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig, Signs
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call, place_after, size_node
from fp4compile.passes.match import aten
from fp4compile.passes.site import Operand, Plan, fake_of, plan_of, set_plan, set_site, site_of

_ONLY_BACKWARD = "must_be_in_backward"  # a tag of torch's partitioner


@dataclass(frozen=True)
class InsertHadamard(Pass):
    """Needs: plans. Leaves: no plan that asks for a rotation; the operand's source is the rotated value instead."""

    name: ClassVar[str] = "insert-hadamard"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        return PassResult(changed=sum(_rotate(node) for node in list(gm.graph.nodes)))


def _rotate(node: fx.Node) -> int:
    site, plan = site_of(node), plan_of(node)
    if site is None or plan is None or site.lhs is None or site.rhs is None:
        return 0
    signs = _draw(node, plan) if any(c is not None and c.signs is Signs.RANDOM for c in (plan.lhs, plan.rhs)) else None
    lhs, left = _rotated(site.lhs, plan.lhs, node, signs)
    rhs, right = _rotated(site.rhs, plan.rhs, node, signs)
    set_site(node, replace(site, lhs=lhs, rhs=rhs))
    set_plan(node, replace(plan, lhs=left, rhs=right))
    return (lhs is not site.lhs) + (rhs is not site.rhs)


def _rotated(operand: Operand, config: QuantConfig | None, node: fx.Node, signs: fx.Node | None) -> tuple[Operand, QuantConfig | None]:
    if config is None or not config.hadamard:
        return operand, config
    if signs is None:
        source, place, tag = operand.source, place_after(operand.source), _side(operand.source)
    else:
        # Before the matmul itself: the draw stands there, and in the backward both operands do.
        source = _with_signs(operand, signs, node)
        place, tag = source, _side(source)
    with node.graph.inserting_after(place):
        value = call(node.graph, ops.HADAMARD, (source, operand.axis, config.hadamard), like=node, tag=tag, source=operand.source)
    return replace(operand, source=value), replace(config, hadamard=0, signs=Signs.FIXED)


def _draw(node: fx.Node, plan: Plan) -> fx.Node:
    """(size,) of 0 and 1, new in every call. The partitioner may never split it: a second draw would not cancel the first."""
    config = plan.lhs or plan.rhs
    assert config is not None
    value = fake_of(node)
    kwargs = {"dtype": torch.int64, "device": value.device, "pin_memory": False}
    with node.graph.inserting_before(node), value.fake_mode:
        # As a row that is squeezed: Inductor of torch 2.11 fails on the CPU where what it drew is indexed without another operator between.
        row = call(node.graph, aten.randint.low, (0, 2, [1, config.hadamard]), kwargs, like=node, tag=_ONLY_BACKWARD)
        return call(node.graph, aten.squeeze.dim, (row, 0), like=node, tag=_ONLY_BACKWARD)


def _with_signs(operand: Operand, signs: fx.Node, node: fx.Node) -> fx.Node:
    """The operand times 1 - 2 signs, repeated along its axis."""
    graph, source = node.graph, operand.source
    value = fake_of(source)
    with graph.inserting_before(node), value.fake_mode:
        length = size_node(graph, source, operand.axis, like=node)
        # Not aten.arange: Inductor decomposes it before passes run, and torch 2.11 has no lowering of it afterwards.
        kwargs = {"start": 0, "step": 1, "dtype": torch.int64, "device": value.device, "requires_grad": False}
        place = call(graph, torch.ops.prims.iota.default, (length,), kwargs, like=node, tag="is_backward")
        place = call(graph, aten.remainder.Scalar, (place, fake_of(signs).shape[0]), like=node, tag="is_backward")
        drawn = call(graph, aten.index.Tensor, (signs, [place]), like=node, tag="is_backward")
        if operand.axis == -2:
            drawn = call(graph, aten.unsqueeze.default, (drawn, -1), like=node, tag="is_backward")
        minus = call(graph, aten.neg.default, (source,), like=node, tag="is_backward")
        chosen = call(graph, aten.ne.Scalar, (drawn, 0), like=node, tag="is_backward")
        return call(graph, aten.where.self, (chosen, minus, source), like=node, tag="is_backward")


def _side(source: fx.Node) -> str | None:
    return source.meta.get("partitioner_tag")

"""Rotate the operands that the plan wants rotated.

    mm(a, b)  ->  mm(a, b), planned to read fp4.hadamard(a) and fp4.hadamard(b)

Both operands of a matmul are rotated along its contraction dimension, so that the rotation cancels inside the product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call, place_after
from fp4compile.passes.site import Operand, plan_of, set_plan, set_site, site_of


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
    lhs, left = _rotated(site.lhs, plan.lhs, node)
    rhs, right = _rotated(site.rhs, plan.rhs, node)
    set_site(node, replace(site, lhs=lhs, rhs=rhs))
    set_plan(node, replace(plan, lhs=left, rhs=right))
    return (lhs is not site.lhs) + (rhs is not site.rhs)


def _rotated(operand: Operand, config: QuantConfig | None, node: fx.Node) -> tuple[Operand, QuantConfig | None]:
    if config is None or not config.hadamard:
        return operand, config
    with node.graph.inserting_after(place_after(operand.source)):
        value = call(node.graph, ops.HADAMARD, (operand.source, operand.axis, config.hadamard), like=node, tag=_side(operand.source))
    return replace(operand, source=value), replace(config, hadamard=0)


def _side(source: fx.Node) -> str | None:
    return source.meta.get("partitioner_tag")

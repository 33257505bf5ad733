"""Let backward products quantize what the forward multiplied with, where the plan says so.

    mm(dy, w), w planned  ->  mm(dy, fp4.dequantize(codes of w)), planned the same

The forward then saves codes for the backward instead of the operands themselves, and both directions see one weight. A backward that
contracts another dimension has to quantize anew all the same: blocks of the forward's codes run the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import QuantConfig, Source
from fp4compile.passes.base import NoMatch, Pass, PassContext, PassResult
from fp4compile.passes.forward_values import Factor, are_kept, find_factor, forward_products, in_place_of, report_unread
from fp4compile.passes.insert import call, place_after, size_node
from fp4compile.passes.insert_quantize import insert_codes
from fp4compile.passes.site import Operand, Site, plan_of, set_plan, set_site, site_of


@dataclass(frozen=True)
class RequantizeForward(Pass):
    """Needs: plans. Leaves: no plan that asks for the forward's values; the operand's source is those values instead.

    An operand that the forward kept in high precision is its own: that is what the forward multiplied with. One that no product of the
    forward reads is reported.
    """

    name: ClassVar[str] = "requantize-forward"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        forward = forward_products(gm)
        asking = [node for node in gm.graph.nodes if (plan := plan_of(node)) is not None and (_asks(plan.lhs) or _asks(plan.rhs))]
        changed = sum(_rewrite(node, forward.get(node.meta.get("seq_nr"), ()), ctx) for node in asking)
        return PassResult(changed=changed, notes=(f"{changed} operands are quantized from the forward's codes",) if changed else ())


def _asks(config: QuantConfig | None) -> bool:
    return config is not None and config.source is Source.FORWARD


def _rewrite(node: fx.Node, forward: Sequence[fx.Node], ctx: PassContext) -> int:
    site, plan = site_of(node), plan_of(node)
    assert site is not None and plan is not None and site.lhs is not None and site.rhs is not None
    lhs = _of_forward(site, site.lhs, node, forward, ctx) if _asks(plan.lhs) else site.lhs
    rhs = _of_forward(site, site.rhs, node, forward, ctx) if _asks(plan.rhs) else site.rhs
    set_site(node, replace(site, lhs=lhs, rhs=rhs))
    set_plan(node, replace(plan, lhs=_original(plan.lhs), rhs=_original(plan.rhs)))
    return (lhs is not site.lhs) + (rhs is not site.rhs)


def _original(config: QuantConfig | None) -> QuantConfig | None:
    return config if config is None else replace(config, source=Source.ORIGINAL)


def _of_forward(site: Site, operand: Operand, node: fx.Node, forward: Sequence[fx.Node], ctx: PassContext) -> Operand:
    """`operand` as the forward multiplied with it."""
    if are_kept(forward):
        return operand
    factor = find_factor(operand, forward)
    if isinstance(factor, NoMatch):
        report_unread(ctx, node, factor)
        return operand
    plan = plan_of(factor.product)
    config = (plan.lhs, plan.rhs)[factor.side] if plan is not None else None
    if config is None:
        return operand
    if config.hadamard:
        raise IllegalCombination(
            where=f"{site.name} ({site.role})",
            found='source = "forward" after a rotated forward',
            needed="The forward's codes hold the rotated operand, which the backward does not multiply with.",
            advice='Leave hadamard out of fprop, or use source = "original".',
        )
    return _decoded(operand, factor, config, node, site)


def _decoded(operand: Operand, factor: Factor, config: QuantConfig, node: fx.Node, site: Site) -> Operand:
    graph = node.graph
    forward = site_of(factor.product)
    assert forward is not None
    origin = (forward.lhs, forward.rhs)[factor.side]
    assert origin is not None
    # The same nodes that the forward's product will read: equal ones become one.
    codes = insert_codes(origin, config, like=factor.product, after=place_after(origin.source))
    with graph.inserting_before(node):
        k = size_node(graph, origin.source, origin.axis, like=node)
        values = call(graph, ops.DEQUANTIZE, (*codes, k, site.dtype), like=node)
        return in_place_of(operand, values, factor, like=node)

"""Let backward products quantize what the forward multiplied with, where the plan says so.

    mm(dy, w), w planned  ->  mm(dy, fp4.dequantize(codes of w)), planned the same

The forward then saves codes for the backward instead of the operands themselves, and both directions see one weight. A backward that
contracts another dimension has to quantize anew all the same: blocks of the forward's codes run the other way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.codegen.formats import QuantConfig, Source
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call, place_after, size_node
from fp4compile.passes.insert_quantize import insert_codes
from fp4compile.passes.site import Operand, Role, Site, fake_of, plan_of, set_plan, set_site, site_of


@dataclass(frozen=True)
class RequantizeForward(Pass):
    """Needs: plans. Leaves: no plan that asks for the forward's values; the operand's source is those values instead.

    An operand that the forward kept in high precision is its own: that is what the forward multiplied with.
    """

    name: ClassVar[str] = "requantize-forward"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        forward = {
            node.meta["seq_nr"]: node
            for node in gm.graph.nodes
            if (site := site_of(node)) is not None and site.role is Role.FPROP and plan_of(node) is not None and "seq_nr" in node.meta
        }
        asking = [node for node in gm.graph.nodes if (plan := plan_of(node)) is not None and (_asks(plan.lhs) or _asks(plan.rhs))]
        changed = sum(_rewrite(node, forward.get(node.meta.get("seq_nr"))) for node in asking)
        return PassResult(changed=changed, notes=(f"{changed} operands are quantized from the forward's codes",) if changed else ())


def _asks(config: QuantConfig | None) -> bool:
    return config is not None and config.source is Source.FORWARD


def _rewrite(node: fx.Node, forward: fx.Node | None) -> int:
    site, plan = site_of(node), plan_of(node)
    assert site is not None and plan is not None and site.lhs is not None and site.rhs is not None
    lhs = _of_forward(site, site.lhs, node, forward) if _asks(plan.lhs) else site.lhs
    rhs = _of_forward(site, site.rhs, node, forward) if _asks(plan.rhs) else site.rhs
    set_site(node, replace(site, lhs=lhs, rhs=rhs))
    set_plan(node, replace(plan, lhs=_original(plan.lhs), rhs=_original(plan.rhs)))
    return (lhs is not site.lhs) + (rhs is not site.rhs)


def _original(config: QuantConfig | None) -> QuantConfig | None:
    return config if config is None else replace(config, source=Source.ORIGINAL)


def _of_forward(site: Site, operand: Operand, node: fx.Node, forward: fx.Node | None) -> Operand:
    """`operand` as the forward multiplied with it."""
    origin, config = _operand_of(operand, forward)
    if forward is None or origin is None or config is None or fake_of(origin.source).ndim != fake_of(operand.source).ndim:
        return operand
    if config.hadamard:
        raise IllegalCombination(
            where=f"{site.name} ({site.role})",
            found='source = "forward" after a rotated forward',
            needed="The forward's codes hold the rotated operand, which the backward does not multiply with.",
            advice='Leave hadamard out of fprop, or use source = "original".',
        )
    graph = node.graph
    # The same nodes that the forward's product will read: equal ones become one.
    codes = insert_codes(origin, config, like=forward, after=place_after(origin.source))
    with graph.inserting_before(node):
        k = size_node(graph, origin.source, origin.axis, like=node)
        values = call(graph, ops.DEQUANTIZE, (*codes, k, site.dtype), like=node)
    # Codes lie with the forward's contraction last, and the backward contracts the other dimension.
    return replace(operand, source=values, axis=-2)


def _operand_of(operand: Operand, forward: fx.Node | None) -> tuple[Operand | None, QuantConfig | None]:
    site, plan = (None, None) if forward is None else (site_of(forward), plan_of(forward))
    if site is None or plan is None:
        return None, None
    pairs = ((site.lhs, plan.lhs), (site.rhs, plan.rhs))
    return next((pair for pair in pairs if pair[0] is not None and pair[0].kind is operand.kind), (None, None))

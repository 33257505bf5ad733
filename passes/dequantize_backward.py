"""Run backward matmuls on what the forward multiplied with, where the plan says so.

    mm(dy, w)  ->  mm(dy, fp4.dequantize(codes of w))

The straight-through gradient of a quantized layer is that of its quantized operands; and the forward saves their codes instead of the
operands themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.passes.base import NoMatch, Pass, PassContext, PassResult
from fp4compile.passes.forward_values import (
    FIRST_FACTOR,
    SCALED,
    Factor,
    are_kept,
    find_factor,
    forward_products,
    in_place_of,
    report_unread,
    swapped,
)
from fp4compile.passes.insert import call
from fp4compile.passes.match import aten, underlying
from fp4compile.passes.site import Operand, OperandKind, Site, plan_of, site_of

_CODES, _K = (slice(0, 3), slice(3, 6)), 7  # positions among the arguments of a scaled product
_VIEWS = {aten.permute.default, aten.view.default, aten.clone.default}


@dataclass(frozen=True)
class DequantizeBackward(Pass):
    """Needs: quantized forwards. Leaves: planned backward matmuls that read `fp4::dequantize` where their forward read codes.

    An operand that no product of the forward reads is reported.
    """

    name: ClassVar[str] = "dequantize-backward"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        forward = forward_products(gm)
        planned = [n for n in gm.graph.nodes if n.target in FIRST_FACTOR and (plan := plan_of(n)) is not None and plan.dequantized]
        return PassResult(changed=sum(_rewrite(n, forward.get(n.meta.get("seq_nr"), ()), ctx) for n in planned))


def _rewrite(node: fx.Node, forward: Sequence[fx.Node], ctx: PassContext) -> int:
    site = site_of(node)
    assert site is not None
    if are_kept(forward):
        return 0
    changed = 0
    for side, of_site in enumerate((site.lhs, site.rhs)):
        position = FIRST_FACTOR[node.target] + side  # type: ignore[index]
        argument: Any = node.args[position]
        if of_site is None or of_site.kind is OperandKind.GRADIENT or _is_done(argument):
            continue
        source, axis = underlying(argument, -1 - side)
        operand = Operand(kind=of_site.kind, source=source, axis=axis)
        factor = find_factor(operand, forward)
        if isinstance(factor, NoMatch):
            report_unread(ctx, node, factor)
        elif _is_quantized(factor):
            node.update_arg(position, _decoded(node, site, operand, side, factor))
            changed += 1
    return changed


def _decoded(node: fx.Node, site: Site, operand: Operand, side: int, factor: Factor) -> fx.Node:
    _refuse_rotation(factor, site)
    codes: Any = factor.product.args[_CODES[factor.side]]
    with node.graph.inserting_before(node):
        values = call(node.graph, ops.DEQUANTIZE, (*codes, factor.product.args[_K], site.dtype), like=node)
        operand = in_place_of(operand, values, factor, like=node)
        if operand.axis == -1 - side:
            return operand.source
        return call(node.graph, aten.permute.default, (operand.source, swapped(operand.source)), like=node)


def _is_quantized(factor: Factor) -> bool:
    """Otherwise the operand itself is what the forward multiplied with."""
    return factor.product.target in SCALED and factor.product.args[_CODES[factor.side]][1] is not None  # type: ignore[index]


def _refuse_rotation(factor: Factor, site: Site) -> None:
    if factor.rotated:
        raise IllegalCombination(
            where=f"{site.name} ({site.role})",
            found='precision = "dequantized" after a rotated forward',
            needed="The forward's codes hold the rotated operand, which the backward does not multiply with.",
            advice='Leave hadamard out of fprop, or use backward = "high_precision".',
        )


def _is_done(factor: Any) -> bool:
    while isinstance(factor, fx.Node) and factor.target in _VIEWS:
        factor = factor.args[0]
    return isinstance(factor, fx.Node) and factor.target is ops.DEQUANTIZE

"""Run backward matmuls on what the forward multiplied with, where the plan says so.

    mm(dy, w)  ->  mm(dy, fp4.dequantize(codes of w))

The straight-through gradient of a quantized layer is that of its quantized operands; and the forward saves their codes instead of the
operands themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.errors import IllegalCombination
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call
from fp4compile.passes.match import aten
from fp4compile.passes.site import Operand, OperandKind, Site, fake_of, is_backward, plan_of, site_of

_A, _B, _K = slice(0, 3), slice(3, 6), 7  # positions among the arguments of `fp4::scaled_mm`
_FIRST_FACTOR = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}


@dataclass(frozen=True)
class DequantizeBackward(Pass):
    """Needs: quantized forwards. Leaves: planned backward matmuls that read `fp4::dequantize` where their forward read codes."""

    name: ClassVar[str] = "dequantize-backward"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        products = gm.graph.find_nodes(op="call_function", target=ops.SCALED_MM)
        forward = {n.meta["seq_nr"]: n for n in products if not is_backward(n) and "seq_nr" in n.meta}
        planned = [n for n in gm.graph.nodes if n.target in _FIRST_FACTOR and (plan := plan_of(n)) is not None and plan.dequantized]
        return PassResult(changed=sum(_rewrite(n, forward[n.meta["seq_nr"]]) for n in planned if n.meta.get("seq_nr") in forward))


def _rewrite(node: fx.Node, forward: fx.Node) -> int:
    site, origin = site_of(node), site_of(forward)
    assert site is not None and origin is not None
    changed = 0
    for side, operand in enumerate((site.lhs, site.rhs)):
        if operand is None or operand.kind is OperandKind.GRADIENT:
            continue
        codes = _codes_of(operand.kind, origin, forward)
        position = _FIRST_FACTOR[node.target] + side  # type: ignore[index]
        if codes is None or _is_done(node.args[position]) or fake_of(codes[0]).ndim != fake_of(node.args[position]).ndim:  # type: ignore[arg-type]
            continue
        _refuse_rotation(codes[0], site)
        with node.graph.inserting_before(node):
            values = call(node.graph, ops.DEQUANTIZE, (*codes, forward.args[_K], site.dtype), like=node)
            # Codes lie with the forward's contraction last: (N, K) of a weight, (tokens, K) of an activation.
            if side == 0:
                values = call(node.graph, aten.permute.default, (values, _swapped(values)), like=node)
        node.update_arg(position, values)
        changed += 1
    return changed


def _refuse_rotation(codes: fx.Node, site: Site) -> None:
    quantize: Any = codes.args[0]
    if quantize.args[0].target is ops.HADAMARD:
        raise IllegalCombination(
            where=f"{site.name} ({site.role})",
            found='precision = "dequantized" after a rotated forward',
            needed="The forward's codes hold the rotated operand, which the backward does not multiply with.",
            advice='Leave hadamard out of fprop, or use backward = "high_precision".',
        )


def _codes_of(kind: OperandKind, origin: Site, forward: fx.Node) -> tuple[Any, ...] | None:
    """Codes, scales and global scale of the forward's operand of this kind; None where it kept its precision."""
    sides: tuple[tuple[Operand | None, slice], ...] = ((origin.lhs, _A), (origin.rhs, _B))
    found = next((forward.args[part] for operand, part in sides if operand is not None and operand.kind is kind), None)
    return found if found is not None and found[1] is not None else None  # type: ignore[index, return-value]


def _is_done(factor: Any) -> bool:
    while isinstance(factor, fx.Node) and factor.target is aten.permute.default:
        factor = factor.args[0]
    return isinstance(factor, fx.Node) and factor.target is ops.DEQUANTIZE


def _swapped(values: fx.Node) -> list[int]:
    rank = values.meta["val"].ndim
    return [*range(rank - 2), rank - 1, rank - 2]

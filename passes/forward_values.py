"""Find what the forward multiplied with, for an operand of its backward: the same value, in whatever shape either of them reads it.

A backward product is paired with its forward by `seq_nr`. An autograd function gives one number to all its products, and its backward may
flatten what its forward took in batches: so the value decides, looked at through views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fp4compile.codegen import ops
from fp4compile.passes.base import NoMatch, PassContext
from fp4compile.passes.errors import ForwardNotRead
from fp4compile.passes.insert import call, size_node
from fp4compile.passes.match import aten, underlying
from fp4compile.passes.site import Operand, OperandKind, Role, fake_of, is_backward, plan_of, site_of

FIRST_FACTOR: Final = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten._grouped_mm.default: 0}
SCALED: Final = (ops.SCALED_MM, ops.SCALED_GROUPED_MM)
_CODES: Final = (0, 3)  # of the left and of the right operand, among the arguments of a scaled product
_SAME_ORDER: Final = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.alias.default, aten.clone.default, aten.detach.default, aten.contiguous.default,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One side of a forward product, as the graph has it now. `axis` is the forward's contraction in `source`."""

    product: fx.Node
    side: int  # 0 left, 1 right
    kind: OperandKind
    source: fx.Node
    axis: int
    rotated: bool


def forward_products(gm: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """The forward products of layers, by `seq_nr`: also those that no pass rewrites."""
    found: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        site = site_of(node)
        if site is not None and site.role is Role.FPROP and not is_backward(node) and "seq_nr" in node.meta:
            found.setdefault(node.meta["seq_nr"], []).append(node)
    return found


def are_kept(products: Sequence[fx.Node]) -> bool:
    """Whether these forward products are all in high precision: then any operand is what the forward multiplied with."""
    return bool(products) and not any((plan := plan_of(product)) is not None and plan.quantizes for product in products)


def find_factor(operand: Operand, products: Sequence[fx.Node]) -> Factor | NoMatch:
    """The side of one of `products` that holds the value of `operand`, in the same order of elements."""
    if not products:
        return NoMatch(reason="its forward is no matmul of this graph")
    found = [factor for product in products for factor in _factors(product) if factor.kind is operand.kind]
    value = _value(operand.source)
    same = next((factor for factor in found if _value(factor.source) is value), None)
    if same is not None:
        return same
    # One product, one such operand: its derivative reads that, also where it is computed anew, as a checkpoint does.
    if len(found) == 1 and same_shape(found[0].source, operand.source):
        return found[0]
    shape = "x".join(map(str, fake_of(operand.source).shape))
    return NoMatch(reason=f"no matmul of its forward reads this {operand.kind} ({shape}) in the same order")


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    return one is other or statically_known_true(sym_eq(tuple(fake_of(one).shape), tuple(fake_of(other).shape)))


def in_place_of(operand: Operand, values: fx.Node, factor: Factor, *, like: fx.Node) -> Operand:
    """`operand`, reading `values`: those of `factor`, with the forward's contraction last. Nodes go to the graph's insertion point."""
    graph = values.graph
    if same_shape(factor.source, operand.source):
        return replace(operand, source=values, axis=operand.axis if factor.axis == -1 else -3 - operand.axis)
    if factor.axis == -2:
        turned = call(graph, aten.permute.default, (values, swapped(values)), like=like)
        values = call(graph, aten.clone.default, (turned,), {"memory_format": torch.contiguous_format}, like=like)
    shape = [size_node(graph, operand.source, axis, like=like) for axis in range(fake_of(operand.source).ndim)]
    return replace(operand, source=call(graph, aten.view.default, (values, shape), like=like))


def report_unread(ctx: PassContext, node: fx.Node, why: NoMatch) -> None:
    """Say in the row of the backward product `node` that it reads an operand as it is. Raises `ForwardNotRead` under strict."""
    site, plan = site_of(node), plan_of(node)
    assert site is not None and plan is not None
    if ctx.strict:
        raise ForwardNotRead(site=site.name, role=site.role, rule=plan.rule, reason=why.reason)
    reason = f"reads an operand as it is, not as the forward multiplied with it: {why.reason}"
    rows = ctx.record.sites
    rows[:] = [replace(r, reason=reason, fallback=True) if (r.name, r.role) == (site.name, str(site.role)) else r for r in rows]


def swapped(values: fx.Node) -> list[int]:
    """The order of dimensions that swaps the last two."""
    rank = fake_of(values).ndim
    return [*range(rank - 2), rank - 1, rank - 2]


def _factors(product: fx.Node) -> Iterable[Factor]:
    site = site_of(product)
    assert site is not None
    is_seen = product.target in FIRST_FACTOR or product.target in SCALED
    for side, operand in enumerate((site.lhs, site.rhs)):
        if operand is not None and is_seen:
            source, axis, rotated = _read_by(product, side)
            yield Factor(product=product, side=side, kind=operand.kind, source=source, axis=axis, rotated=rotated)


def _read_by(product: fx.Node, side: int) -> tuple[fx.Node, int, bool]:
    """What one side of `product` is made from, its axis of contraction, and whether it is rotated on the way."""
    if product.target not in SCALED:
        factor: Any = product.args[FIRST_FACTOR[product.target] + side]  # type: ignore[index]
        return *underlying(factor, -1 - side), False
    codes, scales = product.args[_CODES[side] : _CODES[side] + 2]
    if scales is None:
        return *underlying(codes, -1), False  # type: ignore[arg-type]
    quantize: Any = codes.args[0]  # type: ignore[union-attr]
    source, axis, *_ = quantize.args
    is_rotated = source.target is ops.HADAMARD
    return source.args[0] if is_rotated else source, axis, is_rotated


def _value(node: fx.Node) -> fx.Node:
    """Up through what keeps all elements in their order."""
    while node.op == "call_function" and (node.target in _SAME_ORDER or _moves_nothing(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _moves_nothing(node: fx.Node) -> bool:
    """Whether a permutation moves dimensions of length 1 alone, as einsum has them."""
    if node.target is not aten.permute.default:
        return False
    shape = fake_of(node.args[0]).shape  # type: ignore[arg-type]
    moved = [d % len(shape) for d in node.args[1] if not statically_known_true(shape[d] == 1)]  # type: ignore[union-attr, operator, index]
    return moved == sorted(moved)

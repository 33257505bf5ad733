"""Replace each planned matmul by its quantized form.

    mm(a, b)  ->  fp4.scaled_mm(fp4.quantize(a), fp4.quantize(b))

Stochastic rounding draws from one seeds tensor a graph, made anew by every call of it; each operand reads its own element.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig, Rounding
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call, size_node
from fp4compile.passes.site import Operand, Plan, Site, fake_of, plan_of, set_plan, set_site, site_of

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertQuantize(Pass):
    """Needs: plans without rotations. Leaves: `fp4::scaled_mm` at each planned site, reading only `fp4::quantize` results there."""

    name: ClassVar[str] = "insert-quantize"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        planned = [node for node in gm.graph.nodes if (plan := plan_of(node)) is not None and plan.quantizes and node.target not in _DONE]
        seeds = _Seeds(gm.graph, planned)
        for node in planned:
            _rewrite(node, seeds)
        return PassResult(changed=len(planned), notes=seeds.notes())


_DONE = {ops.SCALED_MM, ops.SCALED_GROUPED_MM}


class _Seeds:
    """One draw of n int64 seeds at the start of the graph part that needs them, and the next unused element of it."""

    def __init__(self, graph: fx.Graph, planned: list[fx.Node]) -> None:
        self.count = sum(config is not None and config.rounding is Rounding.STOCHASTIC for n in planned for config in _configs(n))
        self.used = 0
        if self.count:
            self.tensor = self._draw(graph, planned)

    def _draw(self, graph: fx.Graph, planned: list[fx.Node]) -> fx.Node:
        drawing = [n for n in planned if any(c is not None and c.rounding is Rounding.STOCHASTIC for c in _configs(n))]
        # Drawn in the backward when only gradients are rounded: the forward then has nothing to save for it.
        tags = {n.meta.get("partitioner_tag") for n in drawing}
        tag = tags.pop() if len(tags) == 1 else "is_forward"
        last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
        kwargs = {"dtype": torch.int64, "device": fake_of(drawing[0]).device, "pin_memory": False}
        with graph.inserting_after(last_input), fake_of(drawing[0]).fake_mode:
            return call(graph, aten.randint.low, (0, 2**62, [self.count]), kwargs, like=drawing[0], tag=tag)

    def next(self, graph: fx.Graph, like: fx.Node, tag: str | None) -> fx.Node:
        """A scalar seed that nobody else reads."""
        seed = call(graph, aten.select.int, (self.tensor, 0, self.used), like=like, tag=tag)
        self.used += 1
        return seed

    def notes(self) -> tuple[str, ...]:
        return (f"{self.count} operands are rounded stochastically",) if self.count else ()


def _configs(node: fx.Node) -> tuple[QuantConfig | None, QuantConfig | None]:
    plan = plan_of(node)
    assert plan is not None
    return plan.lhs, plan.rhs


def _rewrite(node: fx.Node, seeds: _Seeds) -> None:
    site, plan = site_of(node), plan_of(node)
    assert site is not None and plan is not None and site.lhs is not None and site.rhs is not None
    left = _quantized(node, site.lhs, plan.lhs, seeds)
    right = _quantized(node, site.rhs, plan.rhs, seeds)
    with node.graph.inserting_before(node):
        new = _scaled_product(node, site, left or _high(node, site.lhs), right or _high(node, site.rhs))
    _carry(new, site, plan)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _scaled_product(node: fx.Node, site: Site, left: tuple[Any, Any, Any], right: tuple[Any, Any, Any]) -> fx.Node:
    assert site.lhs is not None
    k = size_node(node.graph, site.lhs.source, site.lhs.axis, like=node)
    if node.target is aten._grouped_mm.default:
        return call(node.graph, ops.SCALED_GROUPED_MM, (*left, *right, node.args[2], k, site.dtype), like=node)
    bias = node.args[0] if node.target is aten.addmm.default else None
    return call(node.graph, ops.SCALED_MM, (*left, *right, bias, k, site.dtype), like=node)


def _quantized(node: fx.Node, operand: Operand, config: QuantConfig | None, seeds: _Seeds) -> tuple[fx.Node, ...] | None:
    """(codes, scales, global scale) of `operand`, placed as early as possible so that all its readers can share them."""
    if config is None:
        return None
    graph, tag = node.graph, operand.source.meta.get("partitioner_tag")
    stochastic = config.rounding is Rounding.STOCHASTIC
    with graph.inserting_after(_last_of(operand.source)):
        seed = seeds.next(graph, node, tag) if stochastic else None
    with graph.inserting_after(seed or _last_of(operand.source)):
        packed = call(graph, ops.QUANTIZE, (operand.source, operand.axis, *ops.quantize_args(config), seed), like=node, tag=tag)
    parts: list[fx.Node] = []
    for index in range(3):
        with graph.inserting_after(parts[-1] if parts else packed):
            parts.append(call(graph, operator.getitem, (packed, index), like=node, tag=tag))
    return tuple(parts)


def _last_of(source: fx.Node) -> fx.Node:
    """Placeholders stand at the front of a graph; what reads one goes after the last of them."""
    if source.op != "placeholder":
        return source
    return [n for n in source.graph.nodes if n.op == "placeholder"][-1]


def _high(node: fx.Node, operand: Operand) -> tuple[fx.Node, None, None]:
    """The operand as it is, contraction dimension last, as `fp4::scaled_mm` reads it."""
    if operand.axis == -1:
        return operand.source, None, None
    rank = fake_of(operand.source).ndim
    order = [*range(rank - 2), rank - 1, rank - 2]
    return call(node.graph, aten.permute.default, (operand.source, order), like=node), None, None


def _carry(new: fx.Node, site: Site, plan: Plan) -> None:
    set_site(new, site)
    set_plan(new, plan)

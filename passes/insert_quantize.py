"""Replace each planned matmul by its quantized form.

    mm(a, b)  ->  fp4.scaled_mm(fp4.quantize(a), fp4.quantize(b))

Stochastic rounding draws from one seeds tensor a graph, made anew by every call of it; each operand reads its own element.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.insert import call, size_node
from fp4compile.passes.site import CodesOf, Operand, Site, fake_of, plan_of, set_codes_of, set_plan, set_site, site_of

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertQuantize(Pass):
    """Needs: plans without rotations. Leaves: `fp4::scaled_mm` at each planned site, reading only `fp4::quantize` results there."""

    name: ClassVar[str] = "insert-quantize"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        planned = [node for node in gm.graph.nodes if (plan := plan_of(node)) is not None and plan.quantizes and node.target not in _DONE]
        places = _Places(gm.graph, planned)
        for node in planned:
            _rewrite(node, places)
        return PassResult(changed=len(planned), notes=places.notes())


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.alias.default, aten.clone.default}
_DONE = {ops.SCALED_MM, ops.SCALED_GROUPED_MM}


class _Places:
    """Where new nodes go, and the seeds of stochastic rounding: one draw of n int64 values, element i read by operand i alone."""

    def __init__(self, graph: fx.Graph, planned: list[fx.Node]) -> None:
        self.graph = graph
        self.last_input = [n for n in graph.nodes if n.op == "placeholder"][-1] if planned else None
        drawing = [n for n in planned if any(_draws(c) for c in _configs(n))]
        self.count = sum(_draws(c) for n in drawing for c in _configs(n))
        self.used = 0
        self.replaced: dict[fx.Node, fx.Node] = {}
        if drawing:
            self.seeds = self._draw(drawing)

    def _draw(self, drawing: list[fx.Node]) -> fx.Node:
        # Drawn in the backward when only gradients are rounded: the forward then has nothing to save for it.
        tags = {operand.source.meta.get("partitioner_tag") for n in drawing for operand in _drawing_operands(n)}
        tag = tags.pop() if len(tags) == 1 else "is_forward"
        kwargs = {"dtype": torch.int64, "device": fake_of(drawing[0]).device, "pin_memory": False}
        with self.graph.inserting_after(self.last_input), fake_of(drawing[0]).fake_mode:
            return call(self.graph, aten.randint.low, (0, 2**62, [self.count]), kwargs, like=drawing[0], tag=tag)

    def current(self, operand: Operand) -> Operand:
        """An operand may be the result of a matmul that was rewritten before this one."""
        return replace(operand, source=self.replaced.get(operand.source, operand.source))

    def after(self, source: fx.Node) -> fx.Node:
        """Placeholders stand at the front of a graph; what reads one goes after the last of them, and after the draw."""
        if source.op != "placeholder":
            return source
        assert self.last_input is not None
        return self.seeds if self.count else self.last_input

    def seed(self, like: fx.Node, tag: str | None) -> fx.Node:
        """A scalar seed that nobody else reads."""
        seed = call(self.graph, aten.select.int, (self.seeds, 0, self.used), like=like, tag=tag)
        self.used += 1
        return seed

    def notes(self) -> tuple[str, ...]:
        return (f"{self.count} operands are rounded stochastically",) if self.count else ()


def _draws(config: QuantConfig | None) -> bool:
    return config is not None and config.draws


def _configs(node: fx.Node) -> tuple[QuantConfig | None, QuantConfig | None]:
    plan = plan_of(node)
    assert plan is not None
    return plan.lhs, plan.rhs


def _drawing_operands(node: fx.Node) -> list[Operand]:
    site = site_of(node)
    assert site is not None
    pairs = zip((site.lhs, site.rhs), _configs(node), strict=True)
    return [operand for operand, config in pairs if operand is not None and _draws(config)]


def _rewrite(node: fx.Node, places: _Places) -> None:
    site, plan = site_of(node), plan_of(node)
    assert site is not None and plan is not None and site.lhs is not None and site.rhs is not None
    lhs, rhs = places.current(site.lhs), places.current(site.rhs)
    site = replace(site, lhs=lhs, rhs=rhs)
    left = _quantized(node, lhs, plan.lhs, places)
    right = _quantized(node, rhs, plan.rhs, places)
    with node.graph.inserting_before(node):
        new = _scaled_product(node, site, left or _high(node, lhs), right or _high(node, rhs))
    set_site(new, site)
    set_plan(new, plan)
    places.replaced[node] = new
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _scaled_product(node: fx.Node, site: Site, left: tuple[Any, ...], right: tuple[Any, ...]) -> fx.Node:
    assert site.lhs is not None
    k = size_node(node.graph, site.lhs.source, site.lhs.axis, like=node)
    if node.target is aten._grouped_mm.default:
        return call(node.graph, ops.SCALED_GROUPED_MM, (*left, *right, node.args[2], k, site.dtype), like=node)
    bias = node.args[0] if node.target is aten.addmm.default else None
    return call(node.graph, ops.SCALED_MM, (*left, *right, bias, k, site.dtype), like=node)


def _quantized(node: fx.Node, operand: Operand, config: QuantConfig | None, places: _Places) -> tuple[fx.Node, ...] | None:
    """(codes, scales, global scale) of `operand`, placed as early as possible so that all its readers can share them."""
    if config is None:
        return None
    tag = operand.source.meta.get("partitioner_tag")
    place = places.after(operand.source)
    with node.graph.inserting_after(place):
        seed = places.seed(node, tag) if _draws(config) else None
    return insert_codes(operand, config, like=node, after=seed or place, seed=seed)


def insert_codes(
    operand: Operand, config: QuantConfig, *, like: fx.Node, after: fx.Node, seed: fx.Node | None = None
) -> tuple[fx.Node, ...]:
    """(codes, scales, global scale) of `operand`, behind the node `after`. `config` has no rotation."""
    graph, tag = after.graph, operand.source.meta.get("partitioner_tag")
    args = (operand.source, operand.axis, *ops.quantize_args(config), seed)
    with graph.inserting_after(after):
        packed = call(graph, ops.QUANTIZE, args, ops.quantize_keywords(config), like=like, tag=tag, source=operand.source)
    parts: list[fx.Node] = []
    for index in range(3):
        with graph.inserting_after(parts[-1] if parts else packed):
            parts.append(call(graph, operator.getitem, (packed, index), like=like, tag=tag, source=operand.source))
        set_codes_of(parts[-1], _in_place_of(operand.source))
    return tuple(parts)


def _in_place_of(source: fx.Node) -> CodesOf:
    """What a backward that keeps the codes need not keep."""
    source = _first_argument(source) if source.target is ops.HADAMARD else source
    same, node = {source.name}, source
    while node.target in _VIEWS:
        node = _first_argument(node)
        same.add(node.name)
    value = fake_of(source)
    return CodesOf(source=source.name, values=frozenset(same), size=value.numel() * value.element_size())


def _first_argument(node: fx.Node) -> fx.Node:
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    return argument


def _high(node: fx.Node, operand: Operand) -> tuple[fx.Node, None, None]:
    """The operand as it is, contraction dimension last, as `fp4::scaled_mm` reads it."""
    if operand.axis == -1:
        return operand.source, None, None
    rank = fake_of(operand.source).ndim
    order = [*range(rank - 2), rank - 1, rank - 2]
    return call(node.graph, aten.permute.default, (operand.source, order), like=node), None, None

"""Mark quantized weights as constants, and cut them out of a graph.

    fp4.quantize(W)  ->  the same node, marked; the backend makes it an input that the weight store fills

A weight is quantized when a parameter changes, not when the graph runs. In training that is once an optimizer step.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.codegen.residual_ops import QUANTIZE_REPEATED
from fp4compile.passes.base import Pass, PassContext, PassResult
from fp4compile.passes.match import computed_from_parameters, root_parameters
from fp4compile.passes.site import Constant, constant_of, fake_of, input_of, is_order, set_constant

_CONVERT: Final = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Needs: quantize nodes. Leaves: a Constant mark on each that reads nothing but parameters and does not round stochastically."""

    name: ClassVar[str] = "fold-weights"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        weights = computed_from_parameters(gm.graph, ctx.parameters)
        marked = [node for node in gm.graph.nodes if node.target in (ops.QUANTIZE, QUANTIZE_REPEATED) and node in weights]
        fresh = [node for node in marked if constant_of(node) is None]
        for node in fresh:
            set_constant(node, Constant(parameters=tuple(_position(p) for p in root_parameters(node))))
        return PassResult(changed=len(fresh), notes=(f"{len(marked)} quantized weights live in the weight store",))


@dataclass(frozen=True, kw_only=True)
class CutConstant:
    """A constant taken out of a graph: how to compute it, from which inputs, and where the graph now reads it.

    An order of channels is one too, computed from nothing: Inductor takes no tensors that are not inputs.
    """

    compute: fx.GraphModule  # parameters -> (codes, scales, global scale), or nothing -> (order,)
    recipe: str  # equal recipes on equal parameters give equal values
    inputs: tuple[int, ...]  # positions of the parameters among the placeholders of the cut graph as it was
    outputs: tuple[int, ...]  # which of the results the graph reads, in the order of its new placeholders


def cut_constants(gm: fx.GraphModule) -> list[CutConstant]:
    """Replace the results of marked nodes, and orders that activations are quantized in, by new placeholders behind the old ones."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    position = {node: i for i, node in enumerate(placeholders)}
    cuts: list[CutConstant] = []
    last = placeholders[-1] if placeholders else None
    for node in [n for n in gm.graph.nodes if constant_of(n) is not None]:
        roots = root_parameters(node)
        if not all(root in position and input_of(root) is not None for root in roots):
            continue  # the partitioner handed this graph something computed elsewhere; it stays a computation
        compute = _subgraph(gm, node, roots)
        reads = sorted((user for user in node.users if user.target is operator.getitem), key=lambda u: u.args[1])  # type: ignore[arg-type, return-value]
        for read in reads:
            assert last is not None
            last = _as_placeholder(gm.graph, read, last)
        cuts.append(
            CutConstant(
                compute=compute,
                recipe=_recipe(compute.graph),
                inputs=tuple(position[root] for root in roots),
                outputs=tuple(int(read.args[1]) for read in reads),  # type: ignore[arg-type]
            )
        )
    gm.graph.eliminate_dead_code()
    for order in [n for n in gm.graph.nodes if is_order(n)]:
        compute = _subgraph(gm, order, ())
        assert last is not None
        last = _as_placeholder(gm.graph, order, last)
        cuts.append(CutConstant(compute=compute, recipe=_recipe(compute.graph), inputs=(), outputs=(0,)))
    return cuts


def _as_placeholder(graph: fx.Graph, read: fx.Node, after: fx.Node) -> fx.Node:
    with graph.inserting_after(after):
        placeholder = graph.placeholder(f"{read.name}_stored")
    placeholder.meta["val"] = fake_of(read)
    read.replace_all_uses_with(placeholder)
    graph.erase_node(read)
    return placeholder


def _subgraph(gm: fx.GraphModule, result: fx.Node, roots: tuple[fx.Node, ...]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {root: graph.placeholder(f"parameter_{i}") for i, root in enumerate(roots)}
    needed: set[fx.Node] = set()
    stack = [result]
    while stack:
        current = stack.pop()
        if current not in needed and current not in copies:
            needed.add(current)
            stack.extend(current.all_input_nodes)
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = _copied(graph, node, copies)
    graph.output((copies[result],) if is_order(result) else copies[result])
    return fx.GraphModule(gm, graph)


def _copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A conversion becomes ATen's: outside Inductor an operator of prims costs the host 0.4 ms, in every step for every weight."""
    if node.target is not _CONVERT:
        return graph.node_copy(node, lambda n: copies[n])
    x, dtype = node.args
    return graph.call_function(torch.ops.aten._to_copy.default, (copies[x],), {"dtype": dtype})  # type: ignore[index]


def _recipe(graph: fx.Graph) -> str:
    """Text of the computation with its nodes numbered, so that the same computation reads the same in every graph."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda n: number[n])
        lines.append(f"{number[node]} = {node.op} {'' if node.op == 'placeholder' else node.target} {args}")
    return "\n".join(lines)


def _position(parameter: fx.Node) -> int:
    position = input_of(parameter)
    assert position is not None, "a constant reads parameters only"
    return position

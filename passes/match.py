"""Questions about FX nodes that several passes ask: what an operand is, and what it is made from."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from fp4compile.passes.site import fake_of, input_of, is_buffer, is_order

aten = torch.ops.aten

# Same values at the same coordinates: a quantizer can read what lies underneath.
_SAME_VALUES = {aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh_copy.default}
# Nodes that name the same storage or a cast of it, through which a weight is recognised.
_STILL_THE_WEIGHT = _SAME_VALUES | {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.cat.default,
    operator.getitem,
}


_LOOK_UPS = {aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default}


def underlying(node: fx.Node, axis: int) -> tuple[fx.Node, int]:
    """Walk through copies and swaps of the last two dimensions; `axis` (-1 or -2) follows the contraction dimension."""
    while node.op == "call_function":
        if node.target in _SAME_VALUES:
            node = node.args[0]  # type: ignore[assignment]
        elif _swaps_last_two(node):
            node, axis = node.args[0], -3 - axis  # type: ignore[assignment]
        else:
            break
    return node, axis


def _swaps_last_two(node: fx.Node) -> bool:
    rank = fake_of(node).ndim
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]] == swapped  # type: ignore[union-attr, operator]
    if node.target is aten.transpose.int:
        return {d % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[operator]
    return node.target is aten.t.default and rank == 2


def root_parameters(node: fx.Node) -> tuple[fx.Node, ...]:
    """The placeholders that `node` is computed from."""
    seen: set[fx.Node] = set()
    stack, roots = [node], []
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            roots.append(current)
        stack.extend(current.all_input_nodes)
    return tuple(sorted(roots, key=lambda n: input_of(n) or 0))


def named_parameter(node: fx.Node) -> fx.Node | None:
    """The parameter that `node` is a view, cast or slice of; the largest one where it joins several."""
    while node.op == "call_function" and node.target in _STILL_THE_WEIGHT:
        inputs = node.all_input_nodes
        node = max(inputs, key=lambda n: fake_of(n).numel() if isinstance(fake_of(n), torch.Tensor) else 0)
    return node if node.op == "placeholder" else None


def computed_from_parameters(graph: fx.Graph, parameters: Iterable[int], *, also_written: bool = False) -> set[fx.Node]:
    """Nodes whose value depends on parameters alone, so that it changes only when a parameter does. Nothing random counts.

    Nor does a parameter that the graph itself writes to, unless `also_written`: it is a weight, but its value is none to keep.
    Buffers that it only reads, such as a mask on the weight, and literals may have part in a weight, but make none by themselves. What is
    looked up in a table is no weight either: a position's embedding is an activation, though no input is in it.
    """
    known = set(parameters)
    found: set[fx.Node] = set()
    fixed: set[fx.Node] = set()  # depends on such buffers and on literals alone
    written = {node.args[0] for node in graph.nodes if node.target is aten.copy_.default}
    for node in graph.nodes:
        if node.op == "placeholder":
            if input_of(node) in known and (also_written or node not in written):
                found.add(node)
            elif is_buffer(node) and node not in written:
                fixed.add(node)
        elif is_order(node):
            fixed.add(node)
        elif node.op == "call_function" and not _is_random_or_impure(node):
            inputs = node.all_input_nodes
            if fixed.issuperset(inputs):
                fixed.add(node)
            elif all(n in found or n in fixed for n in inputs) and node.target not in _LOOK_UPS:
                found.add(node)
    return found


def _is_random_or_impure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.is_impure()
    return torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable


def computed_from_gradients(graph: fx.Graph) -> set[fx.Node]:
    """Nodes of a joint graph that depend on an incoming gradient."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and node.meta.get("partitioner_tag") == "is_backward"
        if is_tangent or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found

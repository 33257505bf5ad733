"""A graph of thousands of operators as the few dozen boxes that matter: matmuls, quantizers, and what lies between them.

Every matmul, quantizer and rotation is a box. All other operators that touch each other without one of those in between are one box
together, and views are no box at all. Weights are a strip on the matmul that reads them. What no input reaches is not drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import networkx as nx
import torch
from torch import fx

from fp4compile.codegen import ops
from fp4compile.passes.literals import operation_name, short_dtype, short_type
from fp4compile.passes.module_path import module_of
from fp4compile.passes.site import Operand, OperandKind, Plan, Site, fake_of, is_backward, plan_of, site_of
from fp4compile.passes.value_names import is_result_of_tuple, parameter_names

_SINGLE = frozenset({ops.QUANTIZE, ops.QUANTIZE_BOTH, ops.HADAMARD, torch.ops.aten.embedding.default})
_VIEWS = frozenset({
    "alias", "clone", "contiguous", "convert_element_type", "detach", "expand", "getitem", "lift_fresh_copy", "permute", "reshape",
    "select", "slice", "split", "split_with_sizes", "squeeze", "sym_size", "t", "to_copy", "transpose", "unsafe_view", "unsqueeze", "view",
})  # fmt: skip


class Kind(StrEnum):
    INPUT = "input"
    OUTPUT = "output"
    SAVED = "saved by the forward"
    QUANTIZE = "quantize"
    ROTATE = "hadamard"
    MATMUL = "matmul"
    OTHER = "other operators"


@dataclass(frozen=True, kw_only=True)
class Box:
    """One box of the picture. `order` tells boxes apart; a box only reads boxes of lower order."""

    kind: Kind
    order: int
    title: str
    details: tuple[str, ...] = ()
    precision: str = ""  # of a matmul: "nvfp4 W4A4", "bfloat16", ...
    weight: str = ""  # of a matmul: what its weight is
    stored: bool = False  # whether the weight store holds that weight in 4 bits
    module: str = ""
    role: str = ""
    backward: bool = False
    fell_back: bool = False


@dataclass(frozen=True, kw_only=True)
class BoxGraph:
    """Boxes in the order of the graph, and which reads which."""

    boxes: tuple[Box, ...]
    edges: frozenset[tuple[Box, Box]]


def condense(
    gm: fx.GraphModule, fallbacks: frozenset[tuple[str, str]] = frozenset(), parameters: Mapping[int, str] | None = None
) -> BoxGraph:
    """The boxes of `gm`. `fallbacks` holds (site name, role) of matmuls that could not follow the policy, `parameters` the names of
    parameters by their flat input position.
    """
    nodes = list(gm.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    live = _reached_from_inputs(nodes, parameter_names(gm.graph, parameters))
    group = _without_lone_steps(live, _groups(live))
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in live:
        members.setdefault(group[node], []).append(node)
    box_of = {leader: _box(leader, ms, order, fallbacks) for leader, ms in members.items() if not _only_views(leader, ms)}
    return _in_topological_order(box_of.values(), _edges(members, group, box_of))


def _without_lone_steps(live: list[fx.Node], group: dict[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Groups whose only reader is another group of small operators join it: nothing else can tell them apart."""
    readers: dict[fx.Node, set[fx.Node]] = {leader: set() for leader in group.values()}
    known = set(live)
    for node in live:
        for n in node.all_input_nodes:
            if n in known and group[n] is not group[node]:
                readers[group[n]].add(group[node])
    joined: dict[fx.Node, fx.Node] = {}
    for leader in readers:
        reader = next(iter(readers[leader])) if len(readers[leader]) == 1 else leader
        if not _stands_alone(leader) and not _stands_alone(reader) and is_backward(leader) == is_backward(reader):
            joined[leader] = reader

    def final(leader: fx.Node) -> fx.Node:
        while leader in joined and joined[leader] is not leader:
            leader = joined[leader]
        return leader

    return {node: final(leader) for node, leader in group.items()}


def _in_topological_order(boxes: Iterable[Box], edges: Iterable[tuple[Box, Box]]) -> BoxGraph:
    graph: nx.DiGraph[Box] = nx.DiGraph()
    graph.add_nodes_from(boxes)
    graph.add_edges_from(edges)
    ordered = nx.lexicographical_topological_sort(graph, key=lambda b: b.order)
    renumbered = {box: replace(box, order=i) for i, box in enumerate(ordered)}
    return BoxGraph(boxes=tuple(renumbered.values()), edges=frozenset((renumbered[a], renumbered[b]) for a, b in graph.edges))


def _reached_from_inputs(nodes: list[fx.Node], parameters: dict[fx.Node, str]) -> list[fx.Node]:
    """Nodes that depend on data. What depends on parameters or on nothing is part of a weight, a mask or a table of positions."""
    live: dict[fx.Node, None] = {}
    for node in nodes:
        if node.op == "placeholder":
            if node not in parameters and _is_data(node):
                live[node] = None
        elif any(n in live for n in node.all_input_nodes) and not isinstance(node.meta.get("val"), (torch.SymInt, int)):
            live[node] = None
    return list(live)


def _is_data(node: fx.Node) -> bool:
    """Whether an input is drawn. Vectors and embedding tables are taken for parameters even where nobody said which inputs are."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not node.users:
        return False
    if is_backward(node):
        return True
    is_table = any(u.op == "call_function" and operation_name(u.target) == "embedding" and u.args[0] is node for u in node.users)
    return not is_table and not (value.ndim < 2 and value.is_floating_point())


def _stands_alone(node: fx.Node) -> bool:
    """Whether a node is a box by itself."""
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and (node.target in _SINGLE or site_of(node) is not None)


def _groups(live: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Leader of the box of each node.

    Nodes join their inputs where both lie behind equally many boxes that stand alone; so no path leaves a box and comes back to it.
    """
    leader: dict[fx.Node, fx.Node] = {}
    depth: dict[fx.Node, int] = {}
    known = set(live)

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in live:
        inputs = [n for n in node.all_input_nodes if n in known]
        leader[node] = node
        if is_result_of_tuple(node) and _stands_alone(source := inputs[0]):
            leader[node], depth[node] = source, depth[source]
            continue
        depth[node] = max((depth[n] + _stands_alone(find(n)) for n in inputs), default=0)
        for n in inputs:
            joined = not _stands_alone(node) and not _stands_alone(find(n)) and is_backward(node) == is_backward(n)
            if joined and depth[n] == depth[node] and find(n) is not find(node):
                leader[find(node)] = find(n)
    return {node: find(node) for node in live}


def _only_views(leader: fx.Node, members: list[fx.Node]) -> bool:
    return not _stands_alone(leader) and all(_is_view(n) for n in members)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and operation_name(node.target) in _VIEWS


def _edges(members: dict[fx.Node, list[fx.Node]], group: dict[fx.Node, fx.Node], box_of: dict[fx.Node, Box]) -> Iterable[tuple[Box, Box]]:
    """Edges between boxes, straight through groups that are views only."""
    reads: dict[fx.Node, set[fx.Node]] = {}
    for leader, nodes in members.items():
        reads[leader] = {group[n] for node in nodes for n in node.all_input_nodes if n in group} - {leader}
    for leader, box in box_of.items():
        pending, seen = list(reads[leader]), set[fx.Node]()
        while pending:
            source = pending.pop()
            if source in seen:
                continue
            seen.add(source)
            if source in box_of:
                yield box_of[source], box
            else:
                pending.extend(reads[source])


def _box(leader: fx.Node, members: list[fx.Node], order: dict[fx.Node, int], fallbacks: frozenset[tuple[str, str]]) -> Box:
    site, plan = site_of(leader), plan_of(leader)
    place, module, backward = order[members[0]], module_of(leader)[0], is_backward(leader)
    shape = short_type(leader.meta.get("val"))
    if leader.op == "placeholder":
        return Box(kind=Kind.INPUT, order=place, title="gradient" if backward else "input", details=(shape,), backward=backward)
    if leader.op == "output":
        return Box(kind=Kind.OUTPUT, order=place, title="output")
    if leader.target is ops.QUANTIZE:
        return _quantize_box(leader, place)
    if leader.target is ops.QUANTIZE_BOTH:
        return _quantize_both_box(leader, place)
    if leader.target is ops.HADAMARD:
        return Box(kind=Kind.ROTATE, order=place, title=f"hadamard {leader.args[2]}", details=(shape,), module=module, backward=backward)
    if site is not None:
        return _matmul_box(leader, site, plan, place, (site.name, str(site.role)) in fallbacks)
    # What ends a box says where it belongs: the sum after layer 3 and the norm in front of layer 4 are computed for layer 4.
    last = [n for n in members if not _is_view(n) and module_of(n)[0]] or [leader]
    return Box(kind=Kind.OTHER, order=place, title=_what_they_do(members), module=module_of(last[-1])[0], backward=backward)


def _quantize_box(node: fx.Node, place: int) -> Box:
    arguments: tuple[Any, ...] = node.args
    source, axis, *fields, _ = arguments
    config = ops.config_of(*fields)  # type: ignore[arg-type]
    along = "" if axis == -1 else ", along columns"
    return Box(
        kind=Kind.QUANTIZE,
        order=place,
        title=f"quantize {config.describe()}",
        details=(short_type(fake_of(source)) + along,),
        module=module_of(node)[0],
        backward=is_backward(node),
    )


def _quantize_both_box(node: fx.Node, place: int) -> Box:
    arguments: tuple[Any, ...] = node.args
    row, column = ops.config_of(*arguments[1:8]), ops.config_of(*arguments[8:15])
    return Box(
        kind=Kind.QUANTIZE,
        order=place,
        title=f"quantize {row.describe()}",
        details=(short_type(fake_of(arguments[0])), f"and {column.describe()} along columns"),
        module=module_of(node)[0],
        backward=is_backward(node),
    )


def _matmul_box(node: fx.Node, site: Site, plan: Plan | None, place: int, fell_back: bool) -> Box:
    quantizes = plan is not None and plan.quantizes
    dtype = str(site.dtype).removeprefix("torch.")
    what = "attention" if "attention" in site.op else site.op.strip("_")
    sizes = f"{site.m * site.batch} x {site.n} x {site.k}" if site.k != 0 else what
    weight, stored = _weight_text(site, plan)
    return Box(
        kind=Kind.MATMUL,
        order=place,
        title=site.module or what,
        details=(plan.precision if plan is not None and quantizes else dtype, sizes),
        precision=plan.precision if plan is not None and quantizes else dtype,
        weight=weight,
        stored=stored,
        module=site.module,
        role=str(site.role),
        backward=is_backward(node),
        fell_back=fell_back,
    )


def _weight_text(site: Site, plan: Plan | None) -> tuple[str, bool]:
    pairs = ((site.lhs, plan.lhs if plan else None), (site.rhs, plan.rhs if plan else None))
    for operand, config in pairs:
        if operand is not None and operand.kind is OperandKind.WEIGHT:
            fmt = config.describe() if config else short_dtype(fake_of(operand.source).dtype)
            return f"weight {fmt} {_sizes(operand)}", config is not None
    return "", False


def _sizes(operand: Operand) -> str:
    return " x ".join(str(s) for s in fake_of(operand.source).shape)


def _what_they_do(members: list[fx.Node]) -> str:
    """`add, input_layernorm`: modules without matmuls by their name, operators of other modules by theirs."""
    names: dict[str, None] = {}
    for node in members:
        if _is_view(node):
            continue
        path = module_of(node)[0]
        leaf = path.rsplit(".", 1)[-1]
        is_small_module = any(word in leaf.lower() for word in ("norm", "act", "emb", "drop", "ln", "rotary"))
        name = operation_name(node.target)
        names.setdefault(leaf if is_small_module else "attention backward" if "attention" in name else name, None)
    shown = list(names)
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")

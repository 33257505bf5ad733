"""Names that a graph is read by: of its values, and of the parameters among its inputs."""

from __future__ import annotations

import builtins
import keyword
from collections import Counter
from collections.abc import Mapping
from typing import Final

import torch
from torch import fx

from fp4compile.passes.literals import operation_name, result_names
from fp4compile.passes.site import input_of, site_of

_RESERVED: Final = frozenset({*keyword.kwlist, *dir(builtins), "torch", "operator", "math", "graph", "sample", "example_inputs"})


class ValueNames:
    """`mm_3` is the fourth `mm` seen. One table over several prints of a graph keeps each value's name while passes rewrite around it."""

    def __init__(self) -> None:
        self._names: dict[object, str] = {}
        self._counts: Counter[str] = Counter()
        self._used: set[str] = set(_RESERVED)

    def of(self, node: fx.Node) -> str:
        if node not in self._names:
            self._names[node] = self._new_name(node)
        return self._names[node]

    def of_constant(self, key: object) -> str:
        if key not in self._names:
            self._names[key] = self._numbered("c", "")
        return self._names[key]

    def _new_name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return self._numbered("p", "")
        if is_result_of_tuple(node):
            return self._result_name(node)
        if isinstance(node.meta.get("val"), torch.SymInt):
            return self._numbered("size", "_")
        return self._numbered(operation_name(node.target), "_")

    def _result_name(self, node: fx.Node) -> str:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        results = result_names(source.target)
        named = 0 <= index < len(results) and results[index]
        return self._unused(f"{self.of(source)}_{named or index}".replace("-", "m"))

    def _numbered(self, stem: str, separator: str) -> str:
        name = f"{stem}{separator}{self._counts[stem]}"
        self._counts[stem] += 1
        return self._unused(name)

    def _unused(self, name: str) -> str:
        while name in self._used:
            name += "_"
        self._used.add(name)
        return name


def is_result_of_tuple(node: fx.Node) -> bool:
    """Whether `node` picks one result of an operation that has several."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem" or len(node.args) != 2:
        return False
    return isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int)


def parameter_names(graph: fx.Graph, parameters: Mapping[int, str] | None = None) -> dict[fx.Node, str]:
    """Placeholders that are parameters, with their fully qualified names: those at the flat positions `parameters`, and what sites know."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    found = {n: parameters[at] for n in inputs if parameters and (at := input_of(n)) is not None and at in parameters}
    for node in graph.nodes:
        site = site_of(node)
        for operand in (site.lhs, site.rhs) if site is not None else ():
            if operand is not None and operand.parameter:
                found.setdefault(_root(operand.source), operand.parameter)
    return {node: name for node, name in found.items() if node.op == "placeholder"}


def _root(node: fx.Node) -> fx.Node:
    """Through views and casts: nodes with one input."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node

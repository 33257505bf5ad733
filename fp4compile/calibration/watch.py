"""Run a planned graph as it is, and add up what its planned forward matmuls read: once a value, however many of them read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fp4compile.calibration.check import print_of
from fp4compile.calibration.observers import Sums, Wanted
from fp4compile.calibration.record import WeightPrint
from fp4compile.calibration.resolve import needs_all_moments
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import GlobalScale
from fp4compile.instrumented import FIRST_FACTOR, PlannedGraph
from fp4compile.passes.match import named_parameter, root_parameters
from fp4compile.passes.site import Operand, OperandKind, Plan, Role, Site, input_of, plan_of, site_of

Key = tuple[str, ...]  # names of the sites that read one value


class TwoLayersOneName(Fp4CompileError, RuntimeError):
    template = (
        "calibrate: two layers are both called {site}, because the model is compiled in several pieces. "
        "Remove the graph breaks (torch.compile(model, fullgraph=True) says where), or calibrate its parts one by one."
    )


@dataclass(frozen=True, kw_only=True)
class Value:
    """One activation value of a graph: the sites that read it, and what is wanted of it."""

    sites: Key
    wanted: Wanted


@dataclass(kw_only=True)
class Watch:
    """Collects what the graphs of all batches show. `moments`: E[x x^T] of every value, whatever the policy needs."""

    moments: bool
    sums: dict[Key, Sums] = field(default_factory=dict)
    operands: dict[str, WeightPrint] = field(default_factory=dict)  # by site: its weight as it is multiplied
    addresses: dict[str, int] = field(default_factory=dict)  # by site: of the parameter that is its weight
    parameters: dict[str, WeightPrint] = field(default_factory=dict)  # by qualified name: those that belong to observed sites
    reached: set[str] = field(default_factory=set)  # qualified names of all that any matmul reads, observed or not

    def runner(self, gm: fx.GraphModule, names: Mapping[int, str]) -> Callable[[list[Any]], Any]:
        values, inputs = _values_of(gm, self.moments), gm.graph.find_nodes(op="placeholder")
        new = set(values)  # matmuls whose weight has not been looked at
        self.reached |= _read_by_matmuls(gm, names)

        def call(args: list[Any]) -> Any:
            return _Watching(gm, self, values, names, new, dict(zip(inputs, args, strict=True))).run(*args)

        return call

    def of(self, value: Value, k: int, device: torch.device) -> Sums:
        if value.sites not in self.sums:
            self.sums[value.sites] = Sums.empty(k, value.wanted, device)
        found = self.sums[value.sites]
        if found.channel_amax.device != device:  # taken up from a file
            found = self.sums[value.sites] = Sums.of_plain(found.plain(), device)
        return found


class _Watching(PlannedGraph):
    def __init__(
        self,
        gm: fx.GraphModule,
        watch: Watch,
        values: Mapping[fx.Node, Value],
        names: Mapping[int, str],
        new: set[fx.Node],
        inputs: Mapping[fx.Node, Any],
    ) -> None:
        super().__init__(gm)
        self.watch, self.values, self.names, self.new, self.inputs = watch, values, names, new, inputs
        self.seen: set[Key] = set()

    def product(self, n: fx.Node, site: Site, plan: Plan, args: tuple[Any, ...]) -> Tensor:
        value = self.values.get(n)
        if value is not None:
            first = FIRST_FACTOR.get(n.target, 0)
            activation, weight = _factors(site, args[first], args[first + 1])
            if value.sites not in self.seen:
                self.seen.add(value.sites)
                self.watch.of(value, activation.shape[-1], activation.device).add(activation)
            parameter = named_parameter(_operand(site, OperandKind.WEIGHT).source)
            self._refuse_another_layer(site, parameter)
            if n in self.new:
                self.new.discard(n)
                self._print_weight(site, parameter, weight)
        return super(PlannedGraph, self).run_node(n)

    def _refuse_another_layer(self, site: Site, parameter: fx.Node | None) -> None:
        """Layers of one class may even share one compiled graph, to which their parameters are inputs."""
        address = self.inputs[parameter].data_ptr() if parameter is not None else 0
        if self.watch.addresses.setdefault(site.name, address) != address:
            raise TwoLayersOneName(site=site.name)

    def _print_weight(self, site: Site, parameter: fx.Node | None, weight: Tensor) -> None:
        if parameter is not None:  # moved and cast alone: what is computed may differ in the last bit elsewhere
            self.watch.operands[site.name] = print_of(weight)
        for root in root_parameters(_operand(site, OperandKind.WEIGHT).source):
            position = input_of(root)
            if position is not None and position in self.names:
                self.watch.parameters.setdefault(self.names[position], print_of(self.inputs[root]))


def _read_by_matmuls(gm: fx.GraphModule, names: Mapping[int, str]) -> set[str]:
    operands = [o for n in gm.graph.nodes if (site := site_of(n)) is not None for o in (site.lhs, site.rhs) if o is not None]
    weights = [operand.source for operand in operands if operand.kind is OperandKind.WEIGHT]
    return {names[at] for source in weights for root in root_parameters(source) if (at := input_of(root)) is not None and at in names}


def _values_of(gm: fx.GraphModule, moments: bool) -> dict[fx.Node, Value]:
    """What each observed matmul of a planned graph reads."""
    readers: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        site, plan = site_of(node), plan_of(node)
        if node.op == "call_function" and site is not None and plan is not None and plan.quantizes and site.role is Role.FPROP:
            operand = _operand(site, OperandKind.ACTIVATION)
            readers.setdefault((operand.source, operand.axis), []).append(node)
    found: dict[fx.Node, Value] = {}
    for nodes in readers.values():
        wanted = _wanted(nodes)
        value = Value(sites=tuple(_site(n).name for n in nodes), wanted=replace(wanted, moments=wanted.moments or moments))
        found.update(dict.fromkeys(nodes, value))
    return found


def _wanted(nodes: Sequence[fx.Node]) -> Wanted:
    """What the plans of the readers ask for."""
    moments, rotations = False, set[int]()
    for node in nodes:
        plan = plan_of(node)
        assert plan is not None
        for config in (plan.lhs, plan.rhs):
            if config is None:
                continue
            moments |= needs_all_moments(config, sorts_channels=plan.sorts_channels)
            if config.global_scale is GlobalScale.STATIC and config.static_amax is None and config.hadamard:
                rotations.add(config.hadamard)
    return Wanted(moments=moments, rotations=tuple(sorted(rotations)))


def _factors(site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Activation (..., M, K) and weight (..., N, K) of A (..., M, K) times B (..., K, N)."""
    assert site.rhs is not None
    return (a, b.mT) if site.rhs.kind is OperandKind.WEIGHT else (b.mT, a)


def _site(node: fx.Node) -> Site:
    site = site_of(node)
    assert site is not None
    return site


def _operand(site: Site, kind: OperandKind) -> Operand:
    return next(o for o in (site.lhs, site.rhs) if o is not None and o.kind is kind)

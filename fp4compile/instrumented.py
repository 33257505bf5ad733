"""A second compilation of a model whose planned graphs run operator by operator, so that something may happen at each planned matmul.

The graph, the sites and the policy's decisions are those of `backend="fp4"`; the model's usual compilation is not touched and pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fp4compile import capture, handoff
from fp4compile.backend import context_of, follow_schedule
from fp4compile.codegen.target import target_of
from fp4compile.passes.base import Pass
from fp4compile.passes.lower_convolutions import LowerConvolutions
from fp4compile.passes.pipeline import ANALYSIS, run
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import Plan, Site, plan_of, site_of
from fp4compile.policy.rule import Policy

aten = torch.ops.aten
PASSES: Final[tuple[Pass, ...]] = (*ANALYSIS, LowerConvolutions())  # afterwards each planned site is a product of two matrices
FIRST_FACTOR: Final[Mapping[object, int]] = {aten.addmm.default: 1}  # position of the left factor; the right one follows

# (graph, names of its parameters by Dynamo's position) -> what runs it.
Runner = Callable[[fx.GraphModule, Mapping[int, str]], Callable[[list[Any]], Any]]


class PlannedGraph(fx.Interpreter):
    """Runs a planned graph. What planned matmuls do is said by `product`."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is aten.view.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return aten.reshape.default(*args)  # the graph was traced for compiled strides; eager results may lie otherwise
        site, plan = site_of(n), plan_of(n)
        if n.op != "call_function" or site is None or plan is None or not plan.quantizes:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self.product(n, site, plan, args)

    def product(self, n: fx.Node, site: Site, plan: Plan, args: tuple[Any, ...]) -> Tensor:
        """The result of the planned matmul `n`, whose factors stand in `args` from `FIRST_FACTOR` on."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Instrumented:
    """`model` as a callable of the same signature, run by `runner` under `policy`. Nothing is captured before the first call."""

    model: Callable[..., Any]
    policy: Policy
    runner: Runner
    name: str  # of who looks, for messages and caches
    graphs: list[GraphRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = getattr(self.model, "_orig_mod", self.model)  # what torch.compile wraps
        self.run = handoff.compile_apart(self.model, self._backend)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names, buffers = capture.parameter_names(gm, example_inputs), capture.buffer_positions(gm)
        values = capture.parameter_values(names, example_inputs)
        target = target_of(capture.device_of(example_inputs), where=self.name)
        record = GraphRecord(id=capture.compile_id(), training=False, target=target.name, policy=self.policy.name)
        step = follow_schedule(self.policy)

        def plan(joint: fx.GraphModule) -> None:
            ctx, _ = context_of(joint, self.policy, step, record, parameters=names, buffers=buffers, values=values)
            run(joint, ctx, PASSES)

        def runner(graph: fx.GraphModule) -> Callable[[list[Any]], Any]:
            return self.runner(graph, names)

        self.graphs.append(record)
        return handoff.trace_only(gm, example_inputs, transform=plan, fingerprint=self.name, runner=runner)


@contextmanager
def unchanged(model: Callable[..., Any]) -> Iterator[None]:
    """Gradients, buffers and torch's random state are afterwards as they were."""
    module = model if isinstance(model, nn.Module) else None
    parameters: list[nn.Parameter] = list(module.parameters()) if module is not None else []
    gradients: list[Tensor | None] = [p.grad for p in parameters]
    buffers = [(b, b.clone()) for b in module.buffers()] if module is not None else []
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)

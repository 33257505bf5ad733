"""Run the whole pipeline on a model without compiling anything: Dynamo and AOTAutograd trace it, operators run one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from fp4compile import capture, handoff
from fp4compile.codegen.target import target_of
from fp4compile.passes.base import PassContext
from fp4compile.passes.pipeline import ANALYSIS, PIPELINE, run
from fp4compile.passes.record import GraphRecord, SiteDecision
from fp4compile.passes.site import is_backward
from fp4compile.policy.load import load_policy
from fp4compile.policy.rule import Policy

CPU = target_of(torch.device("cpu"))
# Every layer, 4 bits on both sides, no exception: the rule that the eager oracle follows without knowing a policy.
EVERYTHING = {"version": 1, "extends": "bf16", "default": {"precision": "w4a4"}}


class Traced:
    """`torch.compile(model)` under `policy`, every invariant checked after every pass; and what the policies of `also` would decide."""

    def __init__(
        self, model: Callable[..., Any], policy: Any = EVERYTHING, *, also: Mapping[str, Any] | None = None, dynamic: bool | None = False
    ) -> None:
        self.policy = load_policy(policy).resolve_for(CPU)
        self.also = {name: load_policy(p).resolve_for(CPU) for name, p in (also or {}).items()}
        self.graphs: list[GraphRecord] = []
        self.decided: dict[str, list[SiteDecision]] = {name: [] for name in self.also}
        torch._dynamo.reset()
        self.call = torch.compile(model, backend=self._backend, dynamic=dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    @property
    def rows(self) -> list[SiteDecision]:
        return [row for graph in self.graphs for row in graph.sites]

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        names, buffers = capture.parameter_names(gm, inputs), capture.buffer_positions(gm)
        record = _record(self.policy)

        def transform(joint: fx.GraphModule) -> None:
            capture.mark_inputs(joint.graph, buffers)
            training = any(is_backward(n) for n in joint.graph.nodes)
            for name, policy in self.also.items():
                would_be = _record(policy)
                run(joint, _context(policy, would_be, names, training), ANALYSIS)
                self.decided[name] += would_be.sites
            run(joint, _context(self.policy, record, names, training), PIPELINE, check=True)

        def inner(inner_gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
            return make_boxed_func(lambda *args: self.execute(inner_gm, args))

        patches = {"joint_custom_pre_pass": handoff.JointPass(transform, "test")}
        compiled = compile_fx(gm, list(inputs), inner_compile=inner, config_patches=patches)
        self.graphs.append(record)
        return compiled

    def execute(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Run a transformed forward or backward graph."""
        return gm(*inputs)


def _record(policy: Policy) -> GraphRecord:
    return GraphRecord(id=capture.compile_id(), training=False, target="cpu", policy=policy.name)


def _context(policy: Policy, record: GraphRecord, names: dict[int, str], training: bool) -> PassContext:
    return PassContext(decide=lambda sites: policy.decide(sites, training=training), target=CPU, record=record, parameters=names)

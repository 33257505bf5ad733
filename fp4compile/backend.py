"""The torch.compile backend: capture, pipeline, hand-off; nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fp4compile import capture, handoff
from fp4compile.calibration.resolve import Resolver
from fp4compile.codegen.known_bad import check_versions
from fp4compile.codegen.registry import relied_on, sources_of
from fp4compile.codegen.target import target_of
from fp4compile.kernels_ahead import KernelsAhead
from fp4compile.options import Options
from fp4compile.passes.base import Pass, PassContext
from fp4compile.passes.operator_calls import operator_calls
from fp4compile.passes.pipeline import ANALYSIS, PIPELINE, run
from fp4compile.passes.products import ProductShape, static_products
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import Decision, Site, is_backward
from fp4compile.policy.load import load_policy
from fp4compile.policy.rule import Policy
from fp4compile.report.report import Report
from fp4compile.report.trace import Trace
from fp4compile.saved import count_saved
from fp4compile.steps import CLOCK
from fp4compile.tile_search import search_products, wants_search
from fp4compile.weights import STORE

_RECORDS: list[GraphRecord] = []


def fp4(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """`torch.compile(model, backend="fp4")` ends here, once for each graph that Dynamo captures."""
    chosen = Options.parse(options, mode)
    where = 'torch.compile(backend="fp4")'
    device = capture.device_of(example_inputs)
    target = target_of(device, where=where)
    check_versions(target, (), where=where)
    policy = load_policy(chosen.policy)
    step = follow_schedule(policy)
    record = GraphRecord(id=capture.compile_id(), training=False, target=target.name, policy=policy.name)
    transform = _Transform.of(gm, example_inputs, policy, chosen, record, PIPELINE, step)

    products: list[ProductShape] = []
    ahead = KernelsAhead(device=device)

    def checked_transform(graph: fx.GraphModule) -> None:
        transform(graph)
        check_versions(target, relied_on(row.kernel for row in record.sites), where=where)
        ahead.start(operator_calls(graph))
        if wants_search(chosen.mode):
            products.extend(static_products(graph))

    def after_fold(only_folded: Sequence[Any]) -> None:
        if chosen.free_weights and not record.training:
            record.freed_bytes += sum(STORE.free(p) for p in only_folded if isinstance(p, torch.nn.Parameter))

    compiled = handoff.compile_with_inductor(
        gm,
        example_inputs,
        transform=checked_transform,
        fingerprint=chosen.fingerprint(f"{policy.fingerprint()} {policy.phase(step)}"),
        mode=chosen.mode,
        inductor=dict(chosen.inductor),
        store=STORE,
        after_fold=after_fold,
        on_backward=lambda graph: count_saved(graph, transform.parameters, record),
    )
    _RECORDS.append(record)
    ahead.finish()
    if products:
        search_products(products, target, device)
    return compiled


def _reset() -> None:
    _RECORDS.clear()


fp4.reset = _reset  # type: ignore[attr-defined]  # called by torch._dynamo.reset()


def last_report() -> Report:
    """Everything compiled since the last `torch._dynamo.reset()`: all graphs, all sites."""
    return Report(graphs=tuple(_RECORDS))


def explain(model: Callable[..., Any], *args: Any, policy: Any = "auto", strict: bool = False, **kwargs: Any) -> Report:
    """Say what `torch.compile(model, backend="fp4")` would do for these inputs: every site, its precision, rule and reason.

    The model runs once in its own precision, operator by operator; no kernel is built, and buffers are as they were afterwards.
    """
    chosen = Options.parse({"policy": policy, "strict": strict})
    loaded = load_policy(chosen.policy)
    records: list[GraphRecord] = []

    def dry_run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        target = target_of(capture.device_of(example_inputs), where="explain")
        record = GraphRecord(id=capture.compile_id(), training=False, target=target.name, policy=loaded.name)
        transform = _Transform.of(gm, example_inputs, loaded, chosen, record, ANALYSIS, CLOCK.step)
        compiled = handoff.trace_only(gm, example_inputs, transform=transform, fingerprint="explain")
        records.append(record)  # at the end: Inductor may give up half-way and ask Dynamo for another graph
        return compiled

    buffers = [(b, b.clone()) for b in model.buffers()] if isinstance(model, torch.nn.Module) else []
    try:
        handoff.compile_apart(model, dry_run)(*args, **kwargs)
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
    return Report(graphs=tuple(records))


@dataclass(frozen=True, kw_only=True)
class _Transform:
    """The pipeline over one joint graph, with its policy, options and record."""

    policy: Policy
    options: Options
    record: GraphRecord
    passes: Sequence[Pass]
    parameters: Mapping[int, str]
    values: Mapping[int, Tensor]  # of the parameters, held weakly
    buffers: frozenset[int]
    step: int  # optimizer steps done, by which a schedule goes

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        policy: Policy,
        options: Options,
        record: GraphRecord,
        passes: Sequence[Pass],
        step: int,
    ) -> _Transform:
        names, buffers = capture.parameter_names(gm, inputs), capture.buffer_positions(gm)
        values = capture.parameter_values(names, inputs)
        return cls(
            policy=policy, options=options, record=record, passes=passes, parameters=names, values=values, buffers=buffers, step=step
        )

    def __call__(self, gm: fx.GraphModule) -> None:
        record = self.record
        ctx, policy = context_of(
            gm, self.policy, self.step, record,
            parameters=self.parameters, values=self.values, buffers=self.buffers, strict=self.options.strict,
        )  # fmt: skip
        dump = _dump_into(self.options.dump) if self.options.dump else None
        watchers = [Trace(), *([dump] if dump else [])]
        for watcher in watchers:
            watcher.start(record.id, gm, self.parameters)
        run(gm, ctx, self.passes, instruments=watchers, check=self.options.verify)
        if dump:
            for file, source in sources_of({row.kernel for row in record.sites}).items():
                dump.write_kernel(file, source)
        for watcher in watchers:
            watcher.finish(record, policy.to_toml())


def context_of(
    gm: fx.GraphModule,
    policy: Policy,
    step: int,
    record: GraphRecord,
    *,
    parameters: Mapping[int, str],
    buffers: frozenset[int],
    values: Mapping[int, Tensor] | None = None,
    strict: bool = False,
) -> tuple[PassContext, Policy]:
    """What passes over the joint graph `gm` need, and the policy as it is for this graph's device and at optimizer step `step`."""
    capture.mark_inputs(gm.graph, buffers)
    target = target_of(capture.device_of([n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]))
    record.training = any(is_backward(node) for node in gm.graph.nodes)
    here = policy.resolve_for(target, training=record.training).at(step)
    record.policy = here.name

    def decide(sites: list[Site]) -> list[Decision]:
        decisions = here.decide(sites, training=record.training)
        found = here.calibration.found if here.calibration is not None else None
        if found is None:
            return decisions
        return Resolver(calibration=found, target=target, names=parameters, values=values or {}).resolve(sites, decisions)

    return PassContext(decide=decide, target=target, record=record, parameters=parameters, strict=strict), here


def follow_schedule(policy: Policy) -> int:
    """The optimizer step that a compilation holds for; the frame is compiled again where the schedule of `policy` has another phase."""
    if policy.schedule:
        capture.recompile_when_changed(lambda: policy.phase(CLOCK.step), f"phase of the schedule of policy {policy.name}")
    return CLOCK.step


def _dump_into(folder: str) -> Any:
    from fp4compile.report.dump import Dump  # draws pictures: loaded only for those who ask

    return Dump(folder)

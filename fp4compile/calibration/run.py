"""The loop that feeds batches to an instrumented model, and writes down what its layers read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from tqdm import tqdm

from fp4compile.calibration.check import prints_of
from fp4compile.calibration.record import Calibration, WeightPrint
from fp4compile.calibration.state import Progress, beside, digest_of
from fp4compile.calibration.watch import Watch
from fp4compile.codegen.errors import Fp4CompileError, UnknownName
from fp4compile.instrumented import Instrumented, unchanged
from fp4compile.policy.load import load_policy
from fp4compile.policy.rule import Policy

MOMENTS: Final = ("block", "full")
EVERY_LAYER: Final = {"version": 1, "name": "every layer", "default": {"precision": "w4a16"}}


class NoBatches(Fp4CompileError, ValueError):
    template = "calibrate: there are no batches. Give an iterable of tensors, tuples of arguments or mappings of keyword arguments."


class NothingRead(Fp4CompileError, ValueError):
    template = (
        "calibrate: in batch {index} no matmul of policy {policy!r} read anything ({found}). "
        "Give batches with at least one row each, and a policy that quantizes: fp4compile.explain(model, ...) shows what one does."
    )


class NotFiniteInput(Fp4CompileError, ValueError):
    template = (
        "calibrate: {count} elements of what {site} reads are NaN or Inf in batch {index}. Look at this batch and at the layers before "
        "{site}; a model that overflows in float16 may need bfloat16."
    )


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    policy: Any = None,
    out: str | os.PathLike[str] | None = None,
    moments: str = "block",
    save_every: int = 8,
    resume: bool = True,
    progress: bool = True,
) -> Calibration:
    """Run `batches` through `model` in its own precision, and collect what its layers read: see docs/calibration.md.

    batches: tensors, tuples of positional arguments, or mappings of keyword arguments; passed over once.
    policy: a preset, a TOML file or a parsed one, whose 4-bit layers are observed, and of each what it needs; without, all layers that
    can be 4-bit. Its calibration file need not exist: where `out` is not given, it is written.
    moments: "block" collects the 16x16 diagonal blocks of E[x x^T], which scale_rule = "local_hessian" needs; "full" all of it, (K, K)
    float32 a value, which rounding = "gptq" needs, and "local_hessian" beside arc. A policy that names them gets them either way.
    out: the artefact. Every `save_every` batches the state is written beside it, and a killed run goes on from there unless `resume` is
    False.

    The model is in evaluation mode meanwhile; afterwards its mode, buffers and gradients are as they were, whatever happens. Raises
    `NoBatches`, `NothingRead`, `NotFiniteInput`, `TwoLayersOneName`, `OtherRun`, `OtherBatches`, and what `load_policy` raises.
    """
    if moments not in MOMENTS:
        raise UnknownName(what="moments", found=moments, valid=MOMENTS, where="calibrate")
    rules = _unread(load_policy(EVERY_LAYER if policy is None else policy, calibrated=False))
    if out is None and rules.calibration is not None:
        out = rules.calibration.path
    watch = Watch(moments=moments == "full")
    instrumented = Instrumented(model=model, policy=rules, runner=watch.runner, name="calibrate")
    weights = _weights_of(instrumented.model)
    settings = f"{rules.fingerprint()} {moments}"
    run = Progress(path=None if out is None else beside(out), settings=settings, weights=weights)
    if resume:
        run.resume(watch)
    with torch.no_grad(), unchanged(instrumented.model), _evaluating(instrumented.model):
        count = len(batches) if isinstance(batches, Sized) else None
        for index, batch in enumerate(tqdm(batches, total=count, desc="calibrate", unit="batch", disable=not progress)):
            if run.is_behind(index, batch):
                continue
            _observe(instrumented, watch, batch, index)
            run.done.append(digest_of(batch))
            if len(run.done) % save_every == 0:
                run.save(watch)
    if not run.done:
        raise NoBatches
    found = _result(watch, instrumented.model, weights, len(run.done), "calibration" if out is None else Path(out).name)
    if out is not None:
        found.save(out)
    run.forget()
    return found


def _observe(instrumented: Instrumented, watch: Watch, batch: Any, index: int) -> None:
    before = sum(sums.tokens for sums in watch.sums.values())
    if isinstance(batch, Mapping):
        instrumented.run(**batch)
    else:
        instrumented.run(*(batch if isinstance(batch, tuple | list) else (batch,)))
    if sum(sums.tokens for sums in watch.sums.values()) == before:
        matmuls = sum(len(graph.sites) for graph in instrumented.graphs)
        found = f"{matmuls} matmuls in {len(instrumented.graphs)} graphs" if instrumented.graphs else "no graph was run"
        raise NothingRead(index=index, policy=instrumented.policy.name, found=found)
    counts = torch.stack([sums.not_finite.cpu() for sums in watch.sums.values()]).tolist()
    for sites, count in zip(watch.sums, counts, strict=True):
        if count:
            raise NotFiniteInput(count=count, site=sites[0], index=index)


def _result(watch: Watch, model: Callable[..., Any], weights: Mapping[str, WeightPrint], batches: int, name: str) -> Calibration:
    return Calibration(
        entries=tuple(sums.statistics(sites) for sites, sums in watch.sums.items()),
        weights={**weights, **watch.parameters},
        operands=dict(watch.operands),
        unreached=_unreached(model, watch.reached),
        batches=batches,
        name=name,
    )


def _unreached(model: Callable[..., Any], reached: Collection[str]) -> tuple[str, ...]:
    """Weight matrices that no matmul read, under any of their names."""
    named = list(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else []
    found = {id(parameter) for name, parameter in named if name in reached}
    return tuple(name for name, parameter in named if parameter.ndim > 1 and id(parameter) not in found)


def _weights_of(model: Callable[..., Any]) -> dict[str, WeightPrint]:
    return prints_of(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}


def _unread(policy: Policy) -> Policy:
    """Without the statistics of an earlier calibration."""
    choices = policy.choices
    if choices is not None:
        choices = replace(choices, **{name: _unread(getattr(choices, name)) for name in ("native", "other", "training")})
    source = policy.calibration
    return replace(policy, choices=choices, calibration=None if source is None else replace(source, found=None, digest=""))


@contextmanager
def _evaluating(model: Callable[..., Any]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

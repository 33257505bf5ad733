"""One step of a model through a second, instrumented compilation: what quantization does to every operand of every matmul.

The graph, the sites and the policy's decisions are those of `backend="fp4"`; the model's usual compilation is not touched and pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fp4compile import capture, handoff
from fp4compile.backend import context_of, follow_schedule
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.target import target_of
from fp4compile.diagnosis.result import Diagnosis
from fp4compile.diagnosis.watch_graph import Watch
from fp4compile.passes.base import Pass
from fp4compile.passes.lower_convolutions import LowerConvolutions
from fp4compile.passes.pipeline import ANALYSIS, run
from fp4compile.passes.record import GraphRecord
from fp4compile.policy.load import load_policy

PASSES: tuple[Pass, ...] = (*ANALYSIS, LowerConvolutions())  # afterwards each planned site is a product of two matrices


class NothingQuantized(Fp4CompileError, RuntimeError):
    template = (
        "diagnose: policy {policy!r} quantized nothing in this step ({found}). "
        "Call the function that `step` is given, and choose a policy that quantizes: fp4compile.explain(model, ...) shows what one does."
    )


class Diagnoser:
    """Holds the instrumented compilation of `model`, for a training loop that looks every n steps. Nothing is compiled before the first.

    look = Diagnoser(model, policy="nvfp4_train")
    if step % 1000 == 0:
        look(lambda run: run(x).square().mean().backward()).write("diagnosis", name=f"step_{step}")
    """

    def __init__(self, model: Callable[..., Any], *, policy: str | Path | Mapping[str, Any] = "nvfp4_train", draws: int = 16) -> None:
        self.model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.policy = load_policy(policy)
        self.watch = Watch(draws=draws)
        self.instrumented = handoff.compile_apart(self.model, self._backend)
        self.graphs: list[GraphRecord] = []

    def __call__(self, step: Callable[[Callable[..., Any]], Any]) -> Diagnosis:
        """Run `step(instrumented)`, which calls what it is given like the model, and its backward if that is wanted.

        Gradients, buffers and torch's random state are afterwards as they were before: training goes on as if nobody had looked.
        Raises `NothingQuantized`.
        """
        self.watch.found.clear()
        with _unchanged(self.model):
            step(self.instrumented)
        if not self.watch.found:
            found = f"{sum(len(g.sites) for g in self.graphs)} matmuls, all in high precision" if self.graphs else "no graph was run"
            raise NothingQuantized(policy=self.policy.name, found=found)
        return Diagnosis.of(self.policy.name, self.watch.draws, self.watch.found.values())

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names, buffers = capture.parameter_names(gm, example_inputs), capture.buffer_positions(gm)
        target = target_of(capture.device_of(example_inputs), where="diagnose")
        record = GraphRecord(id=capture.compile_id(), training=False, target=target.name, policy=self.policy.name)
        step = follow_schedule(self.policy)

        def plan(joint: fx.GraphModule) -> None:
            run(joint, context_of(joint, self.policy, step, record, parameters=names, buffers=buffers)[0], PASSES)

        self.graphs.append(record)
        return handoff.trace_only(gm, example_inputs, transform=plan, fingerprint="diagnose", runner=self.watch.runner)


def diagnose(
    model: Callable[..., Any],
    step: Callable[[Callable[..., Any]], Any],
    *,
    policy: str | Path | Mapping[str, Any] = "nvfp4_train",
    draws: int = 16,
) -> Diagnosis:
    """What quantization does to every operand of every matmul of `model` in one step, forward and backward.

    step: called with a callable of the model's signature; as in `lambda run: loss_of(run(x), y).backward()`.
    draws: how often each stochastically rounded operand is drawn, to tell bias from noise.

    The step runs operator by operator, several times slower than compiled. Raises `NothingQuantized`, and what `load_policy` raises.
    """
    return Diagnoser(model, policy=policy, draws=draws)(step)


@contextmanager
def _unchanged(model: Callable[..., Any]) -> Iterator[None]:
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

"""One step of a model through a second, instrumented compilation: what quantization does to every operand of every matmul.

The graph, the sites and the policy's decisions are those of `backend="fp4"`; the model's usual compilation is not touched and pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.diagnosis.result import Diagnosis
from fp4compile.diagnosis.watch_graph import Watch
from fp4compile.instrumented import Instrumented, unchanged
from fp4compile.policy.load import load_policy


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
        self.policy = load_policy(policy)
        self.watch = Watch(draws=draws)
        self.instrumented = Instrumented(model=model, policy=self.policy, runner=self.watch.runner, name="diagnose")

    def __call__(self, step: Callable[[Callable[..., Any]], Any]) -> Diagnosis:
        """Run `step(instrumented)`, which calls what it is given like the model, and its backward if that is wanted.

        Gradients, buffers and torch's random state are afterwards as they were before: training goes on as if nobody had looked.
        Raises `NothingQuantized`.
        """
        self.watch.found.clear()
        with unchanged(self.instrumented.model):
            step(self.instrumented.run)
        graphs = self.instrumented.graphs
        if not self.watch.found:
            found = f"{sum(len(g.sites) for g in graphs)} matmuls, all in high precision" if graphs else "no graph was run"
            raise NothingQuantized(policy=self.policy.name, found=found)
        return Diagnosis.of(self.policy.name, self.watch.draws, self.watch.found.values())


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

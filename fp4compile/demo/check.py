"""Whether the compiled model computes the numbers of the eager fake-quantized one: layer by layer, and in its perplexity.

Two sentences, because each alone is weak. Under W4A4 the perplexity is a noisy witness: one bf16 rounding step in the largest
activation moves the tensor's global scale, all its block scales round anew, and after thirty layers two right models differ per token
almost as much as either differs from bf16. A layer on given inputs is a sharp one: rounded to bf16 where eager rounds, it differs in
few codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from fp4compile.demo.fake_quant import NVFP4_ACTIVATION, NVFP4_WEIGHT, fake_quantized
from fp4compile.demo.measure import TextScore, Tick, eager_losses, loss_increase
from fp4compile.handoff import rounding_like_eager

CHECKED_POLICY: Final = "nvfp4"
# A difference is given as a share of the error that FP4 itself makes in that layer, L2 norms. Measured on a CPU, SmolLM2, two windows:
# median 0.02, one layer of 60 above 0.1 (0.115). Four-over-six on one operand, activations left in bf16, or only v_proj left in bf16:
# median 0.68 to 1.04, never below 0.2.
LAYER_TOLERANCE: Final = 0.1
LAYERS_ABOVE: Final = 0.1  # share of layers that may exceed it: where the largest activation was the one that rounded differently
STANDARD_ERRORS: Final = 3.0
LAYER_TOKENS: Final = 256


@dataclass(frozen=True, kw_only=True)
class Check:
    """layers: difference of each decoder layer as a share of FP4's own error in it. Losses are compiled minus eager, per token."""

    layers: tuple[float, ...]
    compiled_perplexity: float
    eager_perplexity: float
    loss_difference: float
    standard_error: float

    @property
    def agrees(self) -> bool:
        near = abs(self.loss_difference) <= max(0.01, STANDARD_ERRORS * self.standard_error)
        return near and self.layers_off <= LAYERS_ABOVE * len(self.layers)

    @property
    def layers_off(self) -> int:
        return sum(difference > LAYER_TOLERANCE for difference in self.layers)

    def __str__(self) -> str:
        return (
            f"Check of {CHECKED_POLICY} against the same numbers computed operator by operator, without the compiler: "
            f"{'they agree' if self.agrees else 'THEY DISAGREE'}.\n"
            f"  {len(self.layers)} layers, each on the same input: differ by {median(self.layers):.1%} of FP4's own error in the median, "
            f"{max(self.layers):.1%} at most\n  ({self.layers_off} above {LAYER_TOLERANCE:.0%}; one in ten may be)\n"
            f"  perplexity: compiled {self.compiled_perplexity:.2f}, eager {self.eager_perplexity:.2f}; "
            f"loss per token {self.loss_difference:+.4f} ({self.standard_error:.4f}), limit {STANDARD_ERRORS:.0f} standard errors"
        )


def check_against_eager(model: Any, compiled: TextScore, windows: Tensor, tick: Tick) -> Check:
    """`compiled` is the score of the model compiled with `CHECKED_POLICY`; its first windows are `windows`."""
    eager_model = fake_quantized(model, NVFP4_WEIGHT, NVFP4_ACTIVATION)
    eager = TextScore(nll=eager_losses(eager_model, windows, tick), seconds=())
    same = TextScore(nll=compiled.nll[: len(windows)], seconds=())
    difference, error = loss_increase(same, eager)
    layers = layer_differences(model, eager_model, windows[0, :LAYER_TOKENS], {"policy": CHECKED_POLICY}, tick)
    return Check(
        layers=tuple(layers),
        compiled_perplexity=same.perplexity,
        eager_perplexity=eager.perplexity,
        loss_difference=difference,
        standard_error=error,
    )


@torch.no_grad()
def layer_differences(model: Any, eager_model: Any, tokens: Tensor, options: dict[str, Any], tick: Tick) -> list[float]:
    """Each decoder layer of `model`, compiled, on the input that the same layer of `eager_model` sees for `tokens` (length,)."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    hooks = [layer.register_forward_hook(lambda _, *call: seen.append(call), with_kwargs=True) for layer in eager_model.model.layers]
    eager_model(input_ids=tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    torch.compiler.reset()
    rounded = {**options, "inductor": rounding_like_eager(tokens.device)}
    compiled = torch.compile(lambda layer, args, kwargs: layer(*args, **kwargs), backend="fp4", dynamic=False, options=rounded)
    differences = []
    for layer, (args, kwargs, expected) in zip(model.model.layers, seen, strict=True):
        found, high_precision = compiled(layer, args, kwargs), layer(*args, **kwargs)
        differences.append(((found - expected).float().norm() / (high_precision - expected).float().norm()).item())
        tick()
    return differences

"""Perplexity and KL of SmolLM2-135M under each weight method, against the model in float32, on the demo's Wikipedia text.

    python tests/perf/methods_smollm2.py --cache .demo --windows 6 [--calibrated] [--json results.json]

All decoder Linears are replaced by values that went through 4 bits, the head and embeddings stay: no compiler, no kernel but the quantizer.
Every row is compared with the float32 model token by token; standard errors are over windows, which are far apart in the text. GPTQ and
local_hessian are calibrated on other windows of the same text.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from linked_package import link_package
from tabulate import tabulate
from torch import Tensor, nn

LINK = link_package()

from fp4compile.codegen.calibrated import quantize_for_inputs  # noqa: E402
from fp4compile.codegen.formats import QuantConfig  # noqa: E402
from fp4compile.codegen.ops import QUANTIZE, quantize_args  # noqa: E402
from fp4compile.codegen.reference.block import dequantize_ref  # noqa: E402
from fp4compile.demo.download import fetch  # noqa: E402
from fp4compile.demo.model import SMOLLM2, load_model, load_tokenizer, open_gguf  # noqa: E402
from fp4compile.demo.text import WIKIPEDIA, clean, windows  # noqa: E402

PLAIN, FOUR_OVER_SIX, SWEEP = QuantConfig(), QuantConfig(scale_rule="four_over_six"), QuantConfig(scale_rule="sweep")
SOAR, DECOUPLED = QuantConfig(scale_rule="soar"), QuantConfig(scale_rule="soar_decoupled")
MIXFP4, MIXED_SWEEP = QuantConfig(format="mixfp4"), QuantConfig(format="mixfp4", scale_rule="sweep")
Moments = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row. `calibrated` names a method of `quantize_for_inputs`; without it the weight config alone decides."""

    name: str
    weight: QuantConfig
    activation: QuantConfig | None = None
    calibrated: str = ""


W4A16 = (
    Method(name="W4A16 nvfp4", weight=PLAIN),
    Method(name="W4A16 4/6", weight=FOUR_OVER_SIX),
    Method(name="W4A16 sweep", weight=SWEEP),
    Method(name="W4A16 SOAR", weight=SOAR),
    Method(name="W4A16 SOAR decoupled", weight=DECOUPLED),
    Method(name="W4A16 MixFP4", weight=MIXFP4),
    Method(name="W4A16 MixFP4 sweep", weight=MIXED_SWEEP),
    Method(name="W4A16 IF4", weight=QuantConfig(format="if4")),
    Method(name="W4A16 NVINT4", weight=QuantConfig(format="nvint4")),
)
W4A4 = (
    Method(name="W4A4 nvfp4", weight=PLAIN, activation=PLAIN),
    Method(name="W4A4 4/6", weight=FOUR_OVER_SIX, activation=FOUR_OVER_SIX),
    Method(name="W4A4 sweep, activations 4/6", weight=SWEEP, activation=FOUR_OVER_SIX),
    Method(name="W4A4 SOAR decoupled, activations 4/6", weight=DECOUPLED, activation=FOUR_OVER_SIX),
    Method(name="W4A4 MixFP4, activations 4/6", weight=MIXFP4, activation=FOUR_OVER_SIX),
    Method(name="W4A4 MixFP4 sweep, activations 4/6", weight=MIXED_SWEEP, activation=FOUR_OVER_SIX),
    Method(name="W4A4 MixFP4, activations MixFP4", weight=MIXFP4, activation=MIXFP4),
)
CALIBRATED = (
    Method(name="W4A16 local_hessian", weight=SWEEP, calibrated="local_hessian"),
    Method(name="W4A16 GPTQ", weight=SWEEP, calibrated="gptq"),
    Method(name="W4A16 GPTQ + local_hessian", weight=SWEEP, calibrated="gptq_local_hessian"),
    Method(name="W4A16 MixFP4, GPTQ + local_hessian", weight=MIXED_SWEEP, calibrated="gptq_local_hessian"),
    Method(name="W4A4 GPTQ + local_hessian, activations 4/6", weight=SWEEP, activation=FOUR_OVER_SIX, calibrated="gptq_local_hessian"),
)


class QuantizedLinear(nn.Module):
    """`linear` on values that went through 4 bits: `weight` (N, K) given, its input where `activation` is."""

    def __init__(self, linear: nn.Linear, weight: Tensor, activation: QuantConfig | None) -> None:
        super().__init__()
        self.weight, self.bias, self.activation = weight, linear.bias, activation

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            quantized = QUANTIZE(x.flatten(0, -2), -1, *quantize_args(self.activation), None)
            x = dequantize_ref(*quantized)[:, : x.shape[-1]].view(x.shape)
        return F.linear(x, self.weight, self.bias)


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)


def quantized(model: Any, method: Method, moments: Moments) -> tuple[Any, float]:
    """A copy of the model under `method`, and the relative error of its weights in percent."""
    made, lost, energy = copy.deepcopy(model), 0.0, 0.0
    for name, linear in list(linears(model)):
        if method.calibrated:
            values = quantize_for_inputs(linear.weight, moments[name], method.weight, method=method.calibrated).dequantize()
        else:
            values = dequantize_ref(*QUANTIZE(linear.weight, -1, *quantize_args(method.weight), None))[:, : linear.in_features]
        lost, energy = lost + (values - linear.weight).square().sum().item(), energy + linear.weight.square().sum().item()
        made.set_submodule(name, QuantizedLinear(linear, values, method.activation))
    return made, 100 * lost / energy


def input_moments(model: Any, text: Tensor) -> Moments:
    """E[x x^T] of the input of every Linear over the tokens of `text` (windows, length)."""
    found: Moments = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            found[name] = found.get(name, 0) + rows.mT @ rows / text.numel()

        return hook

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears(model)]
    for window in text:
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@dataclass(frozen=True, kw_only=True)
class Score:
    """Per window: mean loss and mean KL(float32 || this), nats a token."""

    nll: Tensor
    kl: Tensor


def score(model: Any, text: Tensor, base: list[Tensor]) -> Score:
    """`base` holds the log-probabilities (length, vocabulary) of each window; it is filled where it is empty."""
    fill, nll, kl = not base, [], []
    for index, window in enumerate(text):
        log_p = model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)
        if fill:
            base.append(log_p)
        nll.append(F.nll_loss(log_p[:-1], window[1:]))
        kl.append((base[index].exp() * (base[index] - log_p)).sum(-1).mean())
    return Score(nll=torch.stack(nll), kl=torch.stack(kl))


def mean_and_error(x: Tensor) -> tuple[float, float]:
    return x.mean().item(), (x.std() / len(x) ** 0.5).item()


def row(name: str, found: Score, base: Score, weight_error: float, seconds: float) -> dict[str, Any]:
    (loss, loss_error), (kl, kl_error) = mean_and_error(found.nll - base.nll), mean_and_error(found.kl)
    perplexity = found.nll.mean().exp().item()
    return {
        "method": name, "perplexity": perplexity, "loss": loss, "loss_error": loss_error, "kl": kl, "kl_error": kl_error,
        "weight_error": weight_error, "seconds": seconds,
    }  # fmt: skip


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [r["method"], f"{r['perplexity']:.2f}", f"{r['loss']:+.4f} ({r['loss_error']:.4f})", f"{r['kl']:.4f} ({r['kl_error']:.4f})",
         f"{r['weight_error']:.3f}"]
        for r in rows
    ]  # fmt: skip
    headers = ["method", "perplexity", "nats lost (s.e.)", "KL (s.e.)", "weight error, %"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".demo"), help="where the demo keeps its downloads")
    parser.add_argument("--windows", type=int, default=6, help="of 512 tokens each")
    parser.add_argument("--calibrated", action="store_true", help="GPTQ and local_hessian too, which take minutes")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reader = open_gguf(fetch(SMOLLM2, args.cache))
    text = windows(load_tokenizer(reader), clean(fetch(WIKIPEDIA, args.cache).read_text(encoding="utf-8")), 2 * args.windows)
    model, evaluated = load_model(reader, torch.float32), text[::2]
    base_logits: list[Tensor] = []
    base = score(model, evaluated, base_logits)
    rows = [row("float32", base, base, 0.0, 0.0)]
    methods = [m for m in (*W4A16, *W4A4, *(CALIBRATED if args.calibrated else ())) if any(part in m.name for part in args.only)]
    moments = input_moments(model, text[1::2]) if any(m.calibrated for m in methods) else {}
    for method in methods:
        start = time.perf_counter()
        made, weight_error = quantized(model, method, moments)
        rows.append(row(method.name, score(made, evaluated, base_logits), base, weight_error, time.perf_counter() - start))
        print(as_table(rows[-1:]).splitlines()[-1], f"{rows[-1]['seconds']:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"windows": len(evaluated), "rows": rows}, indent=2) + "\n")
    print(as_table(rows))


if __name__ == "__main__":
    main()

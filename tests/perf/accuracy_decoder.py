"""A language model under every method: what the scripts that measure one share.

All Linears of its blocks compute on values that went through 4 bits; head, embeddings, norms and attention stay in float32: no compiler and
no product of 4-bit numbers, whose results differ from these in the order of sums only. What needs data is calibrated, and what stays in
high precision is chosen, on windows that are not measured.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_layers import collect, install
from accuracy_methods import ROWS, Method
from accuracy_run import Experiment, Results, Scores
from accuracy_sequential import sequential_weights
from torch import Tensor

from fp4compile.isolation.loss import logits_of
from fp4compile.isolation.planned import Batch, call_with

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model in float32, in eval mode, and windows (count, length) of tokens; `blocks` is the path of the list of its blocks.

    batch: of tokens, what the model is called with. chosen_on: windows for calibration and for choosing. in_bf16: the scores in bf16.
    sensitivity: measures it. settings: what results of one file have in common.
    """

    model: Any
    blocks: str
    batch: Callable[[Tensor], Batch]
    texts: dict[str, Tensor]
    chosen_on: Tensor
    vocabulary: int
    in_bf16: Callable[[Scorer], Scores]
    sensitivity: Callable[[], Any]
    settings: dict[str, Any]


class Scorer:
    """Scores a model on all windows, `count` at once, against what the first call scored."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        self.decoder, self.count = decoder, count
        self.base: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, model: Any) -> Scores:
        return {name: self._text(model, name, windows) for name, windows in self.decoder.texts.items()}

    def _text(self, model: Any, name: str, windows: Tensor) -> dict[str, list[float]]:
        base, nll, kl = self.base.setdefault(name, []), [], []
        for i, tokens in enumerate(windows.split(self.count)):
            logits = logits_of(call_with(model, self.decoder.batch(tokens)))
            assert logits is not None, "the model gives logits"
            log_p = logits.float().log_softmax(-1)
            if len(base) <= i:
                base.append(log_p)
            lost = F.nll_loss(log_p[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            nll += lost.view(len(tokens), -1).mean(1).tolist()
            for own, exact in zip(log_p, base[i], strict=True):  # one window at a time: a vocabulary of logits is large
                kl.append((exact.exp() * (exact - own)).sum(-1).mean().item())
        return {"nll": [round(x, 6) for x in nll], "kl": [round(x, 6) for x in kl]}


def measure(decoder: Decoder, results: Results, args: argparse.Namespace, started: float) -> None:
    """Every row that `args` want, none begun `args.seconds` after `started`."""
    experiment, scorer = prepare(decoder, results, args)
    experiment.deadline = started + args.seconds
    experiment.base()
    if "bf16" not in results.data["rows"]:
        cells = {"shifts": {"0": decoder.in_bf16(scorer)}}
        results.row("bf16").update(cells | {"weight_error": 0.0, "extra_k": 0.0, "kept": [], "kept_flops": 0.0})
        results.save()
    print(f"{time.monotonic() - started:.0f} s to begin with", flush=True)
    rows = [row for row in wanted_rows(args.only) if not (args.no_sequential and row.weight.sequential)]
    # What may fail or takes long comes last: rows that keep something need the sensitivity.
    order = {row.name: (row.weight.sequential, bool(row.keep), "gptq" in row.weight.calibrated) for row in rows}
    parts = [[row for row in rows if order[row.name] == rank] for rank in sorted(set(order.values()))]
    done = all(experiment.run(part, args.shifts) for part in parts)
    print("all is done" if done else "to be continued: run the same command again", f"{time.monotonic() - started:.0f} s", flush=True)


def wanted_rows(only: Sequence[str]) -> list[Method]:
    """Rows whose name contains one of `only`."""
    return [method for method in ROWS if any(part in method.name for part in only)]


def prepare(decoder: Decoder, results: Results, args: argparse.Namespace) -> tuple[Experiment, Scorer]:
    """An experiment on a copy of the model."""
    model, scorer, chosen_on = copy.deepcopy(decoder.model), Scorer(decoder, args.batch), decoder.chosen_on
    blocks = {f"{decoder.blocks}.{i}": block for i, block in enumerate(model.get_submodule(decoder.blocks))}
    groups = [[f"{block}.{name}" for name in group] for block in blocks for group in GROUPS]
    layers = install(model, [name for group in groups for name in group])

    @torch.no_grad()
    def run(windows: Tensor) -> None:
        for tokens in windows.split(args.batch):
            call_with(model, decoder.batch(tokens))

    measured = functools.cache(decoder.sensitivity)  # by the first row that keeps something
    experiment = Experiment(
        layers=layers,
        groups=groups,
        score=lambda: scorer(model),
        calibrate=lambda data: collect(layers, lambda: run(chosen_on if data == "text" else random_like(chosen_on, decoder.vocabulary))),
        kept=lambda method: measured().keep(method.keep, policy="nvfp4").modules,
        sequential=lambda method, inputs, shift, kept: sequential_weights(
            blocks, run, layers, groups, method, inputs, chosen_on.split(args.batch), shift, kept=kept
        ),
        results=results,
        reference=args.reference,
    )
    return experiment, scorer


def pick(windows: Any, count: int, offset: int = 0) -> Any:
    """Evenly spread ones of `windows`; other offsets, up to the distance between them, give others."""
    step = len(windows) // count
    assert offset < step, "there are not as many windows"
    return windows[offset::step][:count]


def random_like(windows: Tensor, vocabulary: int) -> Tensor:
    """Tokens of even probability, for a calibration without data."""
    drawn = torch.randint(vocabulary, windows.shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(windows.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and where results are kept."""
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="where results are kept, and looked for")
    parser.add_argument("--out", type=Path, help="a second folder for them")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="windows at once; each has its own global scales (default: some, on a CPU 1)")
    parser.add_argument("--windows", type=int, default=40, help="of each text")
    parser.add_argument("--calibration", type=int, default=128, help="windows for what needs data")
    parser.add_argument("--sensitivity-windows", type=int, default=16, help="how many of those the sensitivity is measured on")
    parser.add_argument("--shifts", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--no-sequential", action="store_true", help="without the rows of GPTQ block by block, the slowest")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this time")
    parser.add_argument("--reference", action="store_true", help="quantize activations in plain torch instead of by kernels")

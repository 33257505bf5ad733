"""Perplexity and KL of SmolLM2-135M under every method, W4A4 and W4A16, on two texts and over shifts of the scale grid.

    python tests/perf/accuracy_pack.py                                   # once, where there is a network
    python tests/perf/accuracy_smollm2.py --out OUT [--seconds 540]      # again, with the same --work, until it says that all is done
    python tests/perf/accuracy_page.py OUT/smollm2.json OUT/sensitivity.json docs/results/smollm2.md

All decoder Linears compute on values that went through 4 bits; head, embeddings, norms and attention stay in float32: no compiler and no
product of 4-bit numbers, whose results differ from these in the order of sums only. Windows of 512 tokens. What needs data is calibrated,
and chosen, on windows of the first text that are not measured. Needs torch, transformers, tabulate and tqdm; no network.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from linked_package import link_package
from torch import Tensor

LINK = link_package()

from accuracy_layers import collect, install  # noqa: E402
from accuracy_methods import ROWS, Method  # noqa: E402
from accuracy_model import load_packed  # noqa: E402
from accuracy_run import Experiment, Results, Scores  # noqa: E402
from accuracy_sequential import sequential_weights  # noqa: E402

import fp4compile  # noqa: E402

TEXTS = ("wiki", "c4")
CHOSEN_ON = "wiki"
VOCABULARY = 49_152
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class Scorer:
    """Scores a model on windows (count, length) of each text, against what the first call scored."""

    def __init__(self, texts: dict[str, Tensor], batch: int) -> None:
        self.texts, self.batch = texts, batch
        self.base: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, model: Any) -> Scores:
        return {name: self._text(model, name, windows) for name, windows in self.texts.items()}

    def _text(self, model: Any, name: str, windows: Tensor) -> dict[str, list[float]]:
        base, nll, kl = self.base.setdefault(name, []), [], []
        for i, batch in enumerate(windows.split(self.batch)):
            log_p = model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)
            if len(base) <= i:
                base.append(log_p)
            nll += F.nll_loss(log_p[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(batch), -1).mean(1).tolist()
            for own, exact in zip(log_p, base[i], strict=True):  # one window at a time: a vocabulary of logits is large
                kl.append((exact.exp() * (exact - own)).sum(-1).mean().item())
        return {"nll": [round(x, 6) for x in nll], "kl": [round(x, 6) for x in kl]}


def pick(windows: Tensor, count: int, offset: int = 0) -> Tensor:
    """Evenly spread ones of `windows`; other offsets, up to the distance between them, give others."""
    step = len(windows) // count
    assert offset < step, "there are not as many windows"
    return windows[offset::step][:count]


def sensitivity(model: Any, windows: Tensor, args: argparse.Namespace) -> Any:
    """Of both formats, roles and blocks; single matmuls under nvfp4 only. Stored beside the results."""
    batches = [{"input_ids": batch, "use_cache": False} for batch in windows.split(args.batch)]
    sites = () if args.quick else ("site",)
    options: dict[str, Any] = {"store": args.work / "sensitivity.json", "progress": False}
    start = time.perf_counter()
    for policy, kinds in (("nvfp4", ("role", "block", *sites)), ("mxfp4", ("role", "block"))):
        found = fp4compile.sensitivity(model, batches, policies=[policy], isolate=kinds, **options)
        print(f"sensitivity of {policy}: {time.perf_counter() - start:.0f} s", flush=True)
    if args.out:
        found.write(args.out, name="sensitivity_table")
        (args.out / "sensitivity.json").write_text((args.work / "sensitivity.json").read_text())
    print(found.to_table(), flush=True)
    return found


def bf16_row(model: Any, scorer: Scorer, results: Results) -> None:
    if "bf16" not in results.data["rows"]:
        row = {"shifts": {"0": scorer(copy.deepcopy(model).bfloat16())}, "weight_error": 0.0, "extra_k": 0.0, "kept": [], "kept_flops": 0.0}
        results.data["rows"]["bf16"] = row
        results.save()


def wanted_rows(only: Sequence[str]) -> list[Method]:
    """Rows whose name contains one of `only`."""
    return [method for method in ROWS if any(part in method.name for part in only)]


def main() -> None:
    args = arguments()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.batch = args.batch or (8 if device.type == "cuda" else 1)
    started = time.monotonic()
    model, tokens = load_packed(args.data)
    if args.quick:
        model.model.layers = model.model.layers[:3]
    experiment, scorer = prepare(model.to(device), {name: windows.to(device) for name, windows in tokens.items()}, args)
    experiment.deadline = started + args.seconds
    experiment.base()
    bf16_row(model, scorer, experiment.results)
    print(f"{time.monotonic() - started:.0f} s to begin with", flush=True)
    rows = [row for row in wanted_rows(args.only) if not (args.no_sequential and row.weight.sequential)]
    # What may fail or takes long comes last: rows that keep something need the sensitivity.
    order = {row.name: (bool(row.keep), row.weight.sequential, "gptq" in row.weight.calibrated) for row in rows}
    parts = [[row for row in rows if order[row.name] == rank] for rank in sorted(set(order.values()))]
    done = all(experiment.run(part, args.shifts) for part in parts)
    print("all is done" if done else "to be continued: run the same command again", f"{time.monotonic() - started:.0f} s", flush=True)


def prepare(plain: Any, tokens: dict[str, Tensor], args: argparse.Namespace) -> tuple[Experiment, Scorer]:
    """An experiment on a copy of `plain`."""
    texts = {name: pick(tokens[name], args.windows) for name in TEXTS}
    chosen_on = pick(tokens[CHOSEN_ON], args.calibration, offset=3)
    assert not any(torch.equal(a, b) for a in texts[CHOSEN_ON] for b in chosen_on), "measured on what was chosen on"
    model, blocks, scorer = copy.deepcopy(plain), len(plain.model.layers), Scorer(texts, args.batch)
    groups = [[f"model.layers.{i}.{name}" for name in group] for i in range(blocks) for group in GROUPS]
    layers = install(model, [name for group in groups for name in group])
    settings = {
        "blocks": blocks,
        "windows": args.windows,
        "calibration": args.calibration,
        "device": plain.device.type,
        "texts": list(TEXTS),
    }
    experiment = Experiment(
        layers=layers,
        groups=groups,
        score=lambda: scorer(model),
        calibrate=lambda data: collect(
            layers, lambda: run_over(model, chosen_on if data == "text" else random_like(chosen_on), args.batch)
        ),
        kept=keeping(lambda: sensitivity(plain, chosen_on[:: max(len(chosen_on) // args.sensitivity_windows, 1)], args)),
        sequential=lambda method, inputs, shift, kept: sequential_weights(
            model, layers, groups, method, inputs, chosen_on.split(args.batch), shift, kept=kept
        ),
        results=Results(args.work / "smollm2.json", settings, args.out),
        reference=args.reference,
    )
    return experiment, scorer


def random_like(windows: Tensor) -> Tensor:
    """Tokens of even probability, for a calibration without data."""
    drawn = torch.randint(VOCABULARY, windows.shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(windows.device)


@torch.no_grad()
def run_over(model: Any, windows: Tensor, batch: int) -> None:
    for part in windows.split(batch):
        model.model(input_ids=part, use_cache=False)


def keeping(measure: Callable[[], Any]) -> Callable[[Method], Sequence[str]]:
    """Measures when it is first asked."""
    found: list[Any] = []

    def kept(method: Method) -> Sequence[str]:
        if not found:
            found.append(measure())
        return found[0].keep(method.keep, policy="nvfp4").modules

    return kept


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/smollm2"), help="what accuracy_pack.py wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="where results are kept, and looked for")
    parser.add_argument("--out", type=Path, help="a second folder for them")
    parser.add_argument("--device")
    parser.add_argument("--batch", type=int, default=0, help="windows at once; each has its own global scales (default: 8, on a CPU 1)")
    parser.add_argument("--windows", type=int, default=40, help="of each text")
    parser.add_argument("--calibration", type=int, default=128, help="windows of the first text for what needs data")
    parser.add_argument("--sensitivity-windows", type=int, default=16, help="how many of those the sensitivity is measured on")
    parser.add_argument("--shifts", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--no-sequential", action="store_true", help="without the rows of GPTQ block by block, the slowest")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this time")
    parser.add_argument("--reference", action="store_true", help="quantize activations in plain torch instead of by kernels")
    parser.add_argument("--quick", action="store_true", help="three blocks, two windows, two shifts: whether everything runs")
    args = parser.parse_args()
    if args.quick:
        args.windows, args.calibration, args.sensitivity_windows, args.shifts = 2, 4, 1, 2
    return args


if __name__ == "__main__":
    main()

"""Perplexity and KL of SmolLM2-135M under every method, W4A4 and W4A16, on two texts and over shifts of the scale grid.

    python tests/perf/accuracy_pack.py                                   # once, where there is a network
    python tests/perf/accuracy_smollm2.py --out OUT [--seconds 540]      # again, with the same --work, until it says that all is done
    python tests/perf/accuracy_page.py OUT docs/results/smollm2.md

What is measured, and how: accuracy_decoder.py. Windows of 512 tokens. What needs data is calibrated, and chosen, on windows of the first
text. Needs torch, transformers, tabulate and tqdm; no network.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from linked_package import link_package
from torch import Tensor

LINK = link_package()

from accuracy_decoder import Decoder, add_arguments, measure, pick  # noqa: E402
from accuracy_model import load_packed  # noqa: E402
from accuracy_run import Results, device_name  # noqa: E402

import fp4compile  # noqa: E402

TEXTS = ("wiki", "c4")
CHOSEN_ON = "wiki"
VOCABULARY = 49_152


def main() -> None:
    started = time.monotonic()
    args = arguments()
    model, tokens = load_packed(args.data)
    if args.quick:
        model.model.layers = model.model.layers[:3]
    decoder = described(model.to(args.device), {name: windows.to(args.device) for name, windows in tokens.items()}, args)
    results = Results(args.work / "smollm2.json", decoder.settings, args.out, device_name(args.device))
    measure(decoder, results, args, started)


def described(model: Any, tokens: dict[str, Tensor], args: argparse.Namespace) -> Decoder:
    texts = {name: pick(tokens[name], args.windows) for name in TEXTS}
    chosen_on = pick(tokens[CHOSEN_ON], args.calibration, offset=3)
    assert not any(torch.equal(a, b) for a in texts[CHOSEN_ON] for b in chosen_on), "measured on what was chosen on"
    return Decoder(
        model=model,
        blocks="model.layers",
        batch=called_with,
        texts=texts,
        chosen_on=chosen_on,
        vocabulary=VOCABULARY,
        in_bf16=lambda score: score(copy.deepcopy(model).bfloat16()),
        sensitivity=lambda: sensitivity(model, chosen_on[:: max(len(chosen_on) // args.sensitivity_windows, 1)], args),
        settings={
            "blocks": len(model.model.layers),
            "windows": args.windows,
            "calibration": args.calibration,
            "device": args.device.type,
            "texts": list(TEXTS),
        },
    )


def called_with(tokens: Tensor) -> dict[str, Any]:
    return {"input_ids": tokens, "use_cache": False}


def sensitivity(model: Any, windows: Tensor, args: argparse.Namespace) -> Any:
    """Of both formats, roles and blocks; single matmuls under nvfp4 only. Stored beside the results."""
    batches = [called_with(tokens) for tokens in windows.split(args.batch)]
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/smollm2"), help="what accuracy_pack.py wrote")
    add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="three blocks, two windows, two shifts: whether everything runs")
    args = parser.parse_args()
    args.batch = args.batch or (8 if args.device.type == "cuda" else 1)
    if args.quick:
        args.windows, args.calibration, args.sensitivity_windows, args.shifts = 2, 4, 1, 2
    return args


if __name__ == "__main__":
    main()

"""Perplexity and KL of the language model that examples/pretrain makes, under every method, on held-out text: weights nobody has rounded.

    python tests/perf/accuracy_example.py --checkpoint runs/30m/bf16/checkpoint.pt --data .text/debian --size 30m --out OUT

What is measured, and how: accuracy_decoder.py. Two texts: `train` and `heldout` of the data folder. What needs data is calibrated, and
chosen, on training windows that are not measured. Needs torch, numpy and tqdm; no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from linked_package import ROOT, link_package
from torch import Tensor

LINK = link_package()
sys.path.insert(0, str(ROOT / "examples" / "pretrain"))

from accuracy_decoder import Decoder, Scorer, add_arguments, measure, pick  # noqa: E402
from accuracy_run import Results, Scores, device_name  # noqa: E402
from model import SIZES, Llama  # noqa: E402
from token_windows import open_tokens  # noqa: E402

import fp4compile  # noqa: E402


def main() -> None:
    started = time.monotonic()
    args = arguments()
    decoder = described(args)
    measure(decoder, Results(args.work / "example.json", decoder.settings, args.out, device_name(args.device)), args, started)


def described(args: argparse.Namespace) -> Decoder:
    saved: dict[str, Any] = torch.load(args.checkpoint, map_location="cpu", weights_only=True, mmap=True)
    vocabulary = json.loads((args.data / "settings.json").read_text())["vocabulary"]
    model = Llama(SIZES[args.size], vocabulary, args.sequence)
    model.load_state_dict(saved["model"])
    model.to(args.device).eval().requires_grad_(False)

    def in_bf16(score: Scorer) -> Scores:
        with torch.autocast(args.device.type, torch.bfloat16):  # as it was trained
            return score(model)

    train, chosen_on = apart(windows(args, "train"), args.windows, args.calibration)
    texts = {"train": train, "heldout": pick(windows(args, "heldout"), args.windows)}
    chosen_on = on_device(chosen_on, args.device)
    return Decoder(
        model=model,
        blocks="layers",
        batch=lambda tokens: tokens,
        texts={name: on_device(found, args.device) for name, found in texts.items()},
        chosen_on=chosen_on,
        vocabulary=vocabulary,
        in_bf16=in_bf16,
        sensitivity=lambda: sensitivity(model, chosen_on[:: max(len(chosen_on) // args.sensitivity_windows, 1)], args),
        settings={
            "size": args.size,
            "step": saved["step"],
            "sequence": args.sequence,
            "windows": args.windows,
            "calibration": args.calibration,
            "device": args.device.type,
            "texts": list(texts),
        },
    )


def windows(args: argparse.Namespace, part: str) -> np.ndarray:
    """All (count, sequence) of a part of the text."""
    tokens = open_tokens(args.data, part)
    return tokens[: len(tokens) // args.sequence * args.sequence].reshape(-1, args.sequence)


def apart(found: np.ndarray, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
    """Two evenly spread choices that have no window in common."""
    both = np.arange(first + second)
    ours = pick(both, first)
    spread = pick(found, len(both))
    return spread[ours], spread[np.setdiff1d(both, ours)]


def on_device(found: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(found.astype(np.int64)).to(device)


def sensitivity(model: Any, chosen_on: Tensor, args: argparse.Namespace) -> Any:
    """Of every matmul alone."""
    store = args.work / "example_sensitivity.json"
    batches = chosen_on.split(args.batch)
    return fp4compile.sensitivity(model, batches, policies=["nvfp4"], isolate=("role", "site"), estimate=False, store=store, progress=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a run of pretrain.py in bf16")
    parser.add_argument("--data", type=Path, required=True, help="what prepare_text.py wrote: settings.json and the tokens of both parts")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a window: what it was trained on")
    add_arguments(parser)
    args = parser.parse_args()
    args.batch = args.batch or (64 if args.device.type == "cuda" else 1)
    return args


if __name__ == "__main__":
    main()

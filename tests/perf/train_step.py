"""A training step of Llama-like decoder layers under `nvfp4_train`, beside the same under torch.compile in bfloat16.

Run `python tests/perf/train_step.py FOLDER [--width 4096] [--tokens 8192] [--policy FILE] [--profile]`; no installation is needed.
Parameters are float32 and a step runs under autocast: forward, backward, fused AdamW, so weights are quantized anew in each. Every linear
is quantized (the layers that the recipe keeps in high precision are a model's last ones). Contenders take turns of a few steps, one
after another as a training loop runs them; medians. The table also tells what autograd holds between forward and backward and how long
the first step took, compilation included. `--profile` prints where the GPU's time goes. Results go to FOLDER/train_step.json.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.perf.linked_package import link_package

_PACKAGE = link_package()

import fp4compile  # noqa: E402 (after link_package)
from examples.pretrain.model import Block, Shape  # noqa: E402
from fp4compile.backend import fp4  # noqa: E402

EVERY_LINEAR = {
    "version": 1,
    "extends": "nvfp4_train",
    "rule": [{"match": "layers.**", "precision": "w4a4"}],
}
ROUNDS, STEPS = 9, 5


class Layers(nn.Module):
    """Decoder layers alone: no embedding and no head, which no recipe quantizes."""

    def __init__(self, shape: Shape, sequence: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        head = shape.width // shape.heads
        angle = torch.outer(torch.arange(sequence), 10_000.0 ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("rotation", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.rotation)
        return x


class Step:
    """One contender: a copy of the model, its optimizer and its compiled forward."""

    def __init__(self, model: nn.Module, x: Tensor, gradient: Tensor, **compile_arguments: Any) -> None:
        torch._dynamo.reset()
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=x.is_cuda)
        self.run = torch.compile(self.model, dynamic=False, **compile_arguments)
        self.x, self.gradient = x, gradient
        self.first_seconds = self.milliseconds(1) / 1e3
        self.saved = self._saved_bytes()
        for _ in range(3):
            self()

    def __call__(self) -> None:
        self.forward().backward(self.gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16):
            return self.run(self.x)

    def milliseconds(self, steps: int) -> float:
        """Of one of `steps` steps, between which nobody waits for the device."""
        _wait(self.x)
        start = time.perf_counter()
        for _ in range(steps):
            self()
        _wait(self.x)
        return 1e3 * (time.perf_counter() - start) / steps

    def _saved_bytes(self) -> int:
        """What autograd holds between forward and backward, parameters and inputs left out."""
        known = {p.untyped_storage().data_ptr() for p in (*self.model.parameters(), *self.model.buffers(), self.x)}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        return sum(size for at, size in kept.items() if at not in known)


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()


def profile(step: Step, calls: int = 5) -> list[tuple[str, float, float]]:
    """(kernel, milliseconds a step, launches a step), longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    _wait(step.x)
    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            step()
        _wait(step.x)
    rows = [(row.key, row.self_device_time_total / 1e3 / calls, row.count / calls) for row in found.key_averages()]
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def main() -> None:
    args = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = Shape(width=args.width, layers=args.layers, heads=args.width // 128, hidden=args.hidden or 7 * args.width // 2)
    with device:
        model = Layers(shape, args.sequence)
        x = torch.randn(args.tokens // args.sequence, args.sequence, args.width, requires_grad=True)
        gradient = torch.randn_like(x, dtype=torch.bfloat16) / args.tokens
    x = x.detach().bfloat16().requires_grad_()
    policy = args.policy or EVERY_LINEAR
    steps = {"bf16": Step(model, x, gradient), "nvfp4_train": Step(model, x, gradient, backend=fp4, options={"policy": policy})}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(step.milliseconds(STEPS))
    rows = {
        name: {"step_ms": median(times[name]), "saved_bytes": step.saved, "first_step_s": step.first_seconds}
        for name, step in steps.items()
    }  # fmt: skip
    given = {**vars(args), "folder": args.folder.name, "policy": str(policy)}
    found = {"device": _device_name(device), "torch": torch.__version__, "given": given, "rows": rows}
    found["report"] = _report()
    _print(rows)
    print(tabulate(found["report"].items()))
    if args.profile:
        found["profile"] = {name: profile(step) for name, step in steps.items()}
        for name, kernels in found["profile"].items():
            print(f"\n{name}: {sum(ms for _, ms, _ in kernels):.2f} ms of kernels a step")
            lines = [(key[:100], f"{ms:.3f}", f"{count:g}") for key, ms, count in kernels[:40]]
            print(tabulate(lines, headers=("kernel", "ms", "launches")))
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "train_step.json").write_text(json.dumps(found, indent=1, default=str) + "\n")


def _report() -> dict[str, float]:
    """What the compiler says it keeps for the backward: codes, and what they stand for."""
    (graph,) = fp4compile.last_report().graphs
    stood_for = graph.saved_bytes_without - (graph.saved_bytes - graph.saved_code_bytes)
    coverage = fp4compile.last_report().coverage
    return {
        "matmuls": coverage.sites, "quantized": coverage.quantized,
        "saved bytes": graph.saved_bytes, "of them codes": graph.saved_code_bytes,
        "codes to what they stand for": graph.saved_code_bytes / max(stood_for, 1),
    }  # fmt: skip


def _print(rows: dict[str, dict[str, float]]) -> None:
    base = rows["bf16"]
    table = [(name, *(f"{row[key]:.4g} ({row[key] / base[key]:.2f}x)" for key in row)) for name, row in rows.items()]
    print(tabulate(table, headers=("", *base)))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, help="of the MLP; default 3.5 times the width")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--policy", help="instead of nvfp4_train on every linear")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()

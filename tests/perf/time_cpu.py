"""Times the CPU operators beside bf16 `F.linear` on SmolLM2-135M's shapes, in turns in one process, after checking their results.

    python tests/perf/time_cpu.py [--threads 2] [--weights 60] [--rows 1 8 512]

Each call takes the next of `--weights` copies of the weight, so that 60 of them mean weights in no cache, as in a decoder, and 1 means
weights in the nearest cache. Numbers are medians of wall time; the lower quartile follows for machines with other work to do.
"""

# ruff: noqa: T201 (a script prints)

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from fp4compile.codegen import ops
from fp4compile.codegen.cpu import launch
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
CONFIG = QuantConfig()
ARGUMENTS = ops.quantize_args(CONFIG)
Timed = Callable[[int], Tensor]


def microseconds(calls: list[Timed], copies: int, seconds: float) -> list[tuple[float, float]]:
    """Median and lower quartile of each call, made in turns."""
    taken: list[list[int]] = [[] for _ in calls]
    end, turn = time.monotonic() + seconds, 0
    while time.monotonic() < end or turn < 30:
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter_ns()
            call(turn % copies)
            times.append(time.perf_counter_ns() - start)
        turn += 1
    return [(float(np.median(t)) / 1e3, float(np.quantile(t, 0.25)) / 1e3) for t in taken]


def check(x: Tensor, w: tuple[Tensor, ...], out: Tensor) -> None:
    expected = x.double() @ dequantize_ref(*w).double().T
    error = (out.double() - expected).norm() / expected.norm()
    if error > 0.005:  # bf16 rounds to 2^-9 of a value
        raise SystemExit(f"wrong result: relative error {error}")


def product_row(n: int, k: int, m: int, copies: int, seconds: float) -> list[str]:
    weights = [torch.randn(n, k).bfloat16() for _ in range(copies)]
    coded = [launch.quantize(w, CONFIG) for w in weights]
    coded_too = [tuple(t.clone() for t in w) for w in coded]  # of its own, or W4A4 would find what W4A16 has just read
    x = torch.randn(m, k).bfloat16()
    xq = ops.QUANTIZE(x, -1, *ARGUMENTS, None)

    def weight_only(i: int) -> Tensor:
        return ops.SCALED_MM(x, None, None, *coded[i], None, k, torch.bfloat16)

    def both(i: int) -> Tensor:
        return ops.SCALED_MM(*ops.QUANTIZE(x, -1, *ARGUMENTS, None), *coded_too[i], None, k, torch.bfloat16)

    check(x, coded[0], weight_only(0))
    check(dequantize_ref(*xq), coded[0], both(0))
    (base, low), *rest = microseconds([lambda i: F.linear(x, weights[i]), weight_only, both], copies, seconds)
    cells = [f"{median:.1f} ({median / base:.2f}), {quartile:.1f} ({quartile / low:.2f})" for median, quartile in rest]
    return [f"{n} x {k}", str(m), f"{base:.1f}, {low:.1f}", *cells]


def quantize_row(config: QuantConfig, dtype: torch.dtype, seconds: float) -> list[str]:
    x = torch.randn(2048, 1024).to(dtype)
    seed = torch.tensor(1)
    calls: list[Timed] = [lambda _: launch.quantize(x, config, seed=seed)[0], lambda _: x.clone()]
    (median, quartile), (copy, _) = microseconds(calls, 1, seconds)
    read = f"{x.nbytes / quartile / 1e3:.1f}"
    return [config.describe(), str(dtype).removeprefix("torch."), f"{median:.0f}, {quartile:.0f}", read, f"{copy:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights", type=int, default=60)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="per line of a table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if reason := launch.available():
        raise SystemExit(reason)
    with torch.no_grad():
        rows = [product_row(n, k, m, args.weights, args.seconds) for n, k in SHAPES for m in args.rows]
        print(f"{args.threads} threads, {args.weights} copies of each weight; microseconds (ratio to bf16): median, lower quartile")
        print(tabulate(rows, headers=["N x K", "M", "bf16", "W4A16", "W4A4 with its quantize"]))
        configs = [
            CONFIG,
            QuantConfig(global_scale="row"),  # type: ignore[arg-type]
            QuantConfig(scale_rule="four_over_six"),  # type: ignore[arg-type]
            QuantConfig(block="16x16"),
            QuantConfig(format="mxfp4"),
            QuantConfig(rounding="stochastic"),  # type: ignore[arg-type]
        ]
        rows = [quantize_row(config, dtype, args.seconds / 2) for config in configs for dtype in (torch.bfloat16, torch.float32)]
        print(tabulate(rows, headers=["quantize 2048 x 1024", "dtype", "us", "GB/s read", "copy us"]))


if __name__ == "__main__":
    main()

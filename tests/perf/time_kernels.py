"""Times kernels from CUDA graphs over rotating copies larger than L2, beside the bytes they must move."""

# ruff: noqa: T201 (prints a table as it goes)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernels import launch
from fp4compile.codegen.ops import quantize_args

_ROTATE_BYTES = 200 << 20  # four times the L2 of an H100


def microseconds(calls: list[Callable[[], object]], repeats: int = 5) -> float:
    """Median time of one call, all of them captured in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[repeats // 2]


def _rotated(make: Callable[[], Callable[[], object]], bytes_each: int) -> float:
    copies = max(2, min(40, _ROTATE_BYTES // max(bytes_each, 1) + 1))
    return microseconds([make() for _ in range(copies)])


def time_all(device: torch.device) -> list[dict[str, Any]]:
    """Rows of name, microseconds, floor at the copy bandwidth measured here, and the alternative's microseconds where there is one."""
    big = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    copy = _rotated(lambda: big.clone, big.nbytes * 2)
    bandwidth = big.nbytes * 2 / copy  # bytes a microsecond
    print(f"\ncopy bandwidth {bandwidth / 1e6:.2f} TB/s\n{'kernel':<46}{'us':>9}{'floor':>9}{'ratio':>8}{'bf16 cuBLAS':>13}")
    rows = [_quantize_row(device, bandwidth, *case) for case in _QUANTIZES]
    rows += [_product_row(device, bandwidth, left, shape) for left in ("bf16", "nvfp4") for shape in _SHAPES]
    return rows


_QUANTIZES = [
    ((r, c), axis, options)
    for r, c in ((4096, 4096), (8192, 8192))
    for axis, options in (
        (-1, {}),
        (-2, {}),
        (-1, {"global_scale": "row"}),
        (-1, {"global_scale": "static", "static_amax": 4.0}),
        (-1, {"block": "16x16"}),
        (-1, {"scale_rule": "four_over_six"}),
        (-2, {"hadamard": 16, "rounding": "stochastic"}),
        (-1, {"format": "mxfp4"}),
    )
] + [((1, 4096), -1, {}), ((64, 4096), -1, {"global_scale": "row"})]
_SHAPES = [(m, n, k) for n, k in ((4096, 4096), (14336, 4096)) for m in (1, 16, 64, 256, 4096)]


def _quantize_row(device: torch.device, bandwidth: float, shape: tuple[int, int], axis: int, options: dict) -> dict[str, Any]:
    config = QuantConfig(**options)
    seed = torch.tensor(1, device=device)

    def make() -> Callable[[], object]:
        x = torch.randn(shape, device=device).bfloat16()
        return lambda: launch.quantize(x, axis, *quantize_args(config), seed)

    elements = shape[0] * shape[1]
    written = elements * config.fmt.bits_per_value / 8
    reads = 2 if config.fmt.has_global_scale and config.global_scale != "static" else 1  # the maximum needs a pass of its own
    name = f"quantize {shape[0]}x{shape[1]} axis {axis} {config.describe()}"
    return _row(name, _rotated(make, elements * 2), (elements * 2 * reads + written) / bandwidth, None)


def _product_row(device: torch.device, bandwidth: float, left: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    m, n, k = shape

    def quantized(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return launch.quantize(torch.randn(rows, k, device=device), -1, *quantize_args(QuantConfig()), None)

    def make() -> Callable[[], object]:
        weight = quantized(n)
        x = (torch.randn(m, k, device=device).bfloat16(), None, None) if left == "bf16" else quantized(m)
        return lambda: launch.scaled_mm(*x, *weight, None, k, torch.bfloat16)

    def make_cublas() -> Callable[[], object]:
        x, weight = torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
        return lambda: torch.nn.functional.linear(x, weight)

    weight_bytes = n * k * 9 // 16
    floor = (weight_bytes + m * k * 2 + m * n * 2) / bandwidth
    return _row(f"product {left} x nvfp4 {m}x{n}x{k}", _rotated(make, weight_bytes), floor, _rotated(make_cublas, n * k * 2))


def _row(name: str, time: float, floor: float, alternative: float | None) -> dict[str, Any]:
    print(f"{name:<46}{time:>9.1f}{floor:>9.1f}{time / floor:>8.1f}{'' if alternative is None else f'{alternative:>13.1f}'}", flush=True)
    return {"name": name, "microseconds": time, "floor": floor, "alternative": alternative}

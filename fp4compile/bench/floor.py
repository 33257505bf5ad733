"""The least time that the bytes and the arithmetic of a case allow on the device at hand, from two speeds measured on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from fp4compile.bench.case import MatmulCase, QuantizeCase
from fp4compile.codegen.formats import FORMATS, GlobalScale
from fp4compile.codegen.target import Target
from fp4compile.codegen.timing import Effort, microseconds


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Bytes a microsecond of a copy, read and written ones counted; operations a microsecond of a bfloat16 product."""

    copy: float
    matmul: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"copy {self.copy / 1e3:.0f} GB/s, bf16 products {self.matmul / 1e6:.3g} TFLOP/s"


def measure_speeds(device: torch.device, effort: Effort, *, small: bool) -> Speeds:
    """`small` spends less on it, for a smoke run.

    An idle GPU needs a moment to raise its clocks: a copy timed at once had 2.7 TB/s on an H200, and 4.2 later. So products run first.
    """
    on_gpu = device.type == "cuda"
    side = (4096 if small else 8192) if on_gpu else (256 if small else 1024)
    x, w = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    if on_gpu:
        _warm_up(lambda: F.linear(x, w), device)
    product = microseconds([lambda: F.linear(x, w)] * 2, device, effort)
    size = (4096 if small else 16384) if on_gpu else (1024 if small else 4096)
    big = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    copy = microseconds([big.clone] * 2, device, effort)
    return Speeds(copy=2 * big.nbytes / copy, matmul=2 * side**3 / product)


def _warm_up(call: Callable[[], object], device: torch.device, seconds: float = 0.5) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        call()
        torch.cuda.synchronize(device)


def matmul_floor(case: MatmulCase, speeds: Speeds, target: Target) -> tuple[float, str]:
    """Microseconds, and what they are spent on.

    Of several weights only those that get rows are read. FP4 instructions are faster than the bfloat16 rate: where they exist, bytes count
    alone.
    """
    weight = case.n * case.k * FORMATS[case.format].bits_per_value / 8 * (min(case.groups, case.m) if case.groups else 1)
    by_bytes = (weight + 2 * case.m * (case.n + case.k)) / speeds.copy
    by_operations = 2 * case.m * case.n * case.k / speeds.matmul
    if case.activation == "fp4" and target.has_fp4_mma:
        by_operations = 0.0
    return (by_bytes, "bytes") if by_bytes >= by_operations else (by_operations, "operations")


def quantize_floor(case: QuantizeCase, speeds: Speeds) -> tuple[float, str]:
    """A scale for the whole tensor must be known before the first code is written: the tensor is read twice."""
    size = case.rows * case.columns
    twice = any(config.fmt.has_global_scale and config.global_scale is GlobalScale.TENSOR for config in case.configs)
    written = sum(config.fmt.bits_per_value / 8 for config in case.configs)
    return size * (2 * (1 + twice) + written) / speeds.copy, "bytes"

"""Search over the tiles of native products, for `mode="max-autotune"`: the fastest that agrees with the reference is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import triton
from torch import Tensor

from fp4compile.codegen import tuning
from fp4compile.codegen.formats import FORMATS, Layout, round_up
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.kernels import launch_native
from fp4compile.codegen.kernels.launch_native import Winner, key_of
from fp4compile.codegen.kernels.native_tiles import FEW_ROWS, Architecture, Plan, architecture_of, plan
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from fp4compile.codegen.target import processors_of
from fp4compile.codegen.timing import QUICK, copies_for, microseconds

_CHECKED: Final = 512  # rows of each side, spread over all of them


@dataclass(frozen=True, kw_only=True)
class _Random:
    """Any codes (rows, Kp/2), and scales that are neither extreme nor NaN, plain and swizzled."""

    codes: Tensor
    scales: Tensor
    swizzled: Tensor

    @classmethod
    def of(cls, rows: int, k: int, fmt: str, device: torch.device, seed: int) -> _Random:
        generator, block = torch.Generator(device).manual_seed(seed), FORMATS[fmt].block
        padded = round_up(k, block)
        codes = torch.randint(0, 256, (rows, padded // 2), dtype=torch.uint8, device=device, generator=generator)
        low, high = (16, 120) if block == 16 else (120, 134)
        scales = torch.randint(low, high, (rows, padded // block), dtype=torch.uint8, device=device, generator=generator)
        scales = scales.view(FORMATS[fmt].scale_dtype)
        return cls(codes=codes, scales=scales, swizzled=lay_out_ref(codes, scales, Layout.SWIZZLED)[1])

    def spread(self) -> slice:
        return slice(None, None, max(1, self.codes.shape[0] // _CHECKED))


def search(spec: KernelSpec, m: int, n: int, k: int, device: torch.device) -> None:
    """Try every plan for (m, k) and (n, k) of the format of `spec`, both random, and record the fastest that is right."""
    major, minor = torch.cuda.get_device_capability(device)
    capability, processors = 10 * major + minor, processors_of(device)
    architecture = architecture_of(capability)
    if architecture is None or spec.op != "scaled_mm" or spec.rhs is None or not (m and n and k):
        return
    fmt = spec.rhs.format
    key = key_of(m, n, k, FORMATS[fmt].block)
    if tuning.lookup(device, key, (Winner,)) is not None:
        return
    x = _Random.of(m, k, fmt, device, seed=0)
    weights = [_Random.of(n, k, fmt, device, seed=1 + i) for i in range(copies_for(n * k * 9 // 16, device))]

    def run(weight: _Random, winner: Winner, out_dtype: torch.dtype) -> Tensor:
        return launch_native.scaled_mm(
            x.codes, x.swizzled, None, weight.codes, weight.swizzled, None, None, k, out_dtype, a_layout=Layout.SWIZZLED,
            b_layout=Layout.SWIZZLED, capability=capability, processors=processors, chosen=winner.plan(architecture),
        )  # fmt: skip

    def time(winner: Winner) -> float:
        _check(run(weights[0], winner, torch.float32), x, weights[0], k, winner)
        return microseconds([partial(run, weight, winner, spec.dtype) for weight in weights], device, QUICK)

    # RuntimeError covers a launch that the device refuses and `WrongTile`.
    failures: tuple[type[Exception], ...] = (triton.TritonError, RuntimeError, ValueError)
    tuning.search(device, key, candidates(architecture, m, n, k, processors), time, failures)


def candidates(architecture: Architecture, m: int, n: int, k: int, processors: int) -> Iterator[Winner]:
    """The planned choice first, then every tile that is not much wider than `m`, with k whole and in a few parts."""
    seen = dict.fromkeys([Winner.of(plan(architecture, m, n, k, processors=processors))])
    for tile in architecture.tiles:
        fits = tile.block_c // 2 < max(m, 16) and m <= 4 * tile.block_c if tile.swapped else m > FEW_ROWS
        if not fits:
            continue
        rows, columns = (n, m) if tile.swapped else (m, n)
        full = tile.persistent or -(-rows // tile.block_r) * -(-columns // tile.block_c) >= 2 * processors
        for splits in (1,) if full else (1, 2, 4, 8):
            if splits == 1 or 2 * splits * tile.block_k <= k:
                seen[Winner.of(Plan(tile=tile, splits=splits))] = None
    yield from seen


def _check(found: Tensor, x: _Random, weight: _Random, k: int, winner: Winner) -> None:
    rows, columns = x.spread(), weight.spread()
    expected = scaled_mm_ref(
        x.codes[rows], x.scales[rows], None, weight.codes[columns], weight.scales[columns], None, None, k, torch.float32
    )
    tuning.refuse_another_product(found[rows, columns], expected, winner)

"""A global scale for each run of 128 values of a row: `global_scale = "1x128"`, the outer scale of TetraJet-v2 (arXiv 2510.27527).

No maximum over a tensor or a long row has to be known before the first value is quantized. Runs are rows of their own: (..., R, K) with
K zero-padded to whole runs is quantized as (..., R * runs, 128) with a scale a row, by whatever quantizes rows, bit for bit. In a product
such a scale is no epilogue any more: each run is multiplied exactly and summed in float32, scaled, and then added to the runs before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.formats import BLOCK_OF_SCALES, RUN, round_up

Multiply = Callable[..., Tensor]


def runs_as_rows(x: Tensor, axis: int) -> Tensor:
    """(..., R * runs, 128) of `x` (..., R, C), whose dimension `axis`, -1 or -2, is zero-padded to whole runs."""
    x = x if axis == -1 else x.mT
    *batch, rows, k = x.shape
    runs = round_up(k, RUN) // RUN
    return F.pad(x, (0, runs * RUN - k)).reshape(*batch, rows * runs, RUN)


def rows_as_runs(codes: Tensor, scales: Tensor, global_scale: Tensor, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., R, Kp/2), scales (..., R, Kp/16) and global scale (..., R, Kp/128) of what `runs_as_rows(x, axis)` was quantized to."""
    *batch, rows, k = (x if axis == -1 else x.mT).shape
    runs = round_up(k, RUN) // RUN
    return (
        codes.reshape(*batch, rows, runs * codes.shape[-1]),
        scales.reshape(*batch, rows, runs * scales.shape[-1]),
        global_scale.reshape(*batch, rows, runs),
    )


def is_by_runs(operand: Tensor, global_scale: Tensor | None) -> bool:
    """Whether the global scale of `operand`, plain codes or values (..., R, C), has a number for each run (..., R, runs)."""
    return global_scale is not None and global_scale.ndim == operand.ndim


def multiply_by_runs(
    multiply: Multiply,
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    bias: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_mm_ref` where either global scale is by runs. `multiply` is it, or a kernel for it, without such scales.

    From the first run to the last: sum = fl(sum + fl(run * fl(a_global * b_global))); then fl(sum + bias), and one cast to `out_dtype`.
    """
    out = a.new_zeros((*a.shape[:-1], b.shape[-2]), dtype=torch.float32)
    for run in range(round_up(k, RUN) // RUN):
        left, right = _run_of(a, a_scales, a_global, run), _run_of(b, b_scales, b_global, run)
        out += multiply(*left, *right, None, min(RUN, k - run * RUN), torch.float32)
    return (out if bias is None else out + bias.float()).to(out_dtype)


def _run_of(x: Tensor, scales: Tensor | None, global_scale: Tensor | None, run: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if is_by_runs(x, global_scale):
        global_scale = global_scale[..., run]  # type: ignore[index]
    if scales is None:
        return x[..., run * RUN : (run + 1) * RUN], None, global_scale
    blocks = RUN // BLOCK_OF_SCALES[scales.dtype]
    return x[..., run * RUN // 2 : (run + 1) * RUN // 2], scales[..., run * blocks : (run + 1) * blocks], global_scale

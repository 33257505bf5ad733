"""Host side of the product whose global scales change every 128 columns. Both operands are dequantized first, to bfloat16 and exactly."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import RUN, round_up
from fp4compile.codegen.kernels.launch_matmul import Operand
from fp4compile.codegen.kernels.runs_mm import runs_mm_kernel
from fp4compile.codegen.reference.runs import is_by_runs

_FEW_ROWS: Final = 64
# Rows, columns and warps of a tile. Two sums in registers: 128x128 spills. Two stages take 64 and 96 KiB: every GPU from sm_80 on has that.
_SMALL: Final = (64, 64, 4)
_LARGE: Final = (128, 64, 8)


class RunsOfOtherOperands(Fp4CompileError, ValueError):
    template = (
        "fp4::scaled_mm: a global scale each 1x128 meets an operand in {found}; both must be nvfp4, with global scales of any kind. "
        "Quantize both, or use global_scale = 'row'."
    )


def multiply_runs(
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    k: int,
) -> None:
    """`out` (..., M, N) contiguous = A times B transposed, as `multiply_by_runs` defines it. Raises `RunsOfOtherOperands`."""
    for x, scales, global_scale in ((a, a_scales, a_global), (b, b_scales, b_global)):
        if scales is None or scales.dtype is not torch.float8_e4m3fn or global_scale is None:
            raise RunsOfOtherOperands(found=x.dtype if scales is None else scales.dtype)
    batch = a.shape[:-2]
    left, right = _halves(a, a_scales, batch, k), _halves(b, b_scales, batch, k)
    a_global, b_global = _each_run(a, a_global, batch, k), _each_run(b, b_global, batch, k)
    m, n = out.shape[-2:]
    block_m, block_n, warps = _SMALL if m <= _FEW_ROWS else _LARGE
    if bias is not None:
        bias = bias.expand(out.shape).reshape(-1, m, n)
    runs_mm_kernel[(batch.numel() * -(-m // block_m) * -(-n // block_n),)](
        left, a_global, right, b_global, bias, out, m, n, k,
        *left.stride()[:2], *a_global.stride(), *right.stride()[:2], *b_global.stride(), *((0, 0, 0) if bias is None else bias.stride()),
        BLOCK_M=block_m, BLOCK_N=block_n, RUN=RUN, MASKED=k % RUN != 0, num_warps=warps, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip


def _halves(codes: Tensor, scales: Tensor | None, batch: torch.Size, k: int) -> Tensor:
    """(batch, R, k rounded up to 8) bfloat16: elements times their block scales."""
    return Operand.of(codes, scales, None, batch, "fp4::scaled_mm").dequantized(k, torch.bfloat16).data


def _each_run(codes: Tensor, global_scale: Tensor | None, batch: torch.Size, k: int) -> Tensor:
    """(batch, R, runs) of a global scale for each matrix, row or run; what is shared has stride 0."""
    assert global_scale is not None
    if not is_by_runs(codes, global_scale):
        global_scale = global_scale[..., None] if global_scale.ndim == codes.ndim - 1 else global_scale[..., None, None]
    rows, runs = codes.shape[-2], round_up(k, RUN) // RUN
    return global_scale.expand(*batch, rows, runs).reshape(batch.numel(), rows, runs)

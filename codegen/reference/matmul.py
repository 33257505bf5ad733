"""Block-scaled matrix product: float32 accumulation of exact operands, global scales and bias after it, one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.runs import is_by_runs, multiply_by_runs


def scaled_mm_ref(
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
    """(..., M, N) = A (..., M, K) times B (..., N, K) transposed, plus `bias` broadcast.

    An operand is packed codes with its scales, or a high-precision tensor with `scales` None. The order is
    fl(fl(acc * fl(a_global * b_global)) + bias), then one cast to `out_dtype`. Global scales by runs of K: see `multiply_by_runs`.
    """
    if is_by_runs(a, a_global) or is_by_runs(b, b_global):
        return multiply_by_runs(scaled_mm_ref, a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype)
    left, right = _operand(a, a_scales, k), _operand(b, b_scales, k)
    out = left @ right.mT
    if a_global is not None and b_global is not None:
        out = out * (_per_row(a_global, left) * _per_row(b_global, right).mT)
    elif a_global is not None:
        out = out * _per_row(a_global, left)
    elif b_global is not None:
        out = out * _per_row(b_global, right).mT
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)


def _operand(x: Tensor, scales: Tensor | None, k: int) -> Tensor:
    return x.float() if scales is None else dequantize_ref(x, scales)[..., :k]


def _per_row(global_scale: Tensor, operand: Tensor) -> Tensor:
    """Global scale as (..., R or 1, 1)."""
    if global_scale.ndim == operand.ndim - 1:
        return global_scale[..., None]
    return global_scale[..., None, None]

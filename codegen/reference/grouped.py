"""Grouped product for mixtures of experts: rows of A are split among the matrices of B by cumulative offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.codegen.reference.matmul import scaled_mm_ref


def scaled_grouped_mm_ref(
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    offs: Tensor,
    k: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, N) where rows offs[g-1]..offs[g] of A (T, K) meet B[g] (N, K). Rows past the last offset are zero."""
    out = a.new_zeros((a.shape[0], b.shape[-2]), dtype=out_dtype)
    start = 0
    for group, end in enumerate(offs.tolist()):
        rows = slice(start, end)
        out[rows] = scaled_mm_ref(
            a[rows],
            None if a_scales is None else a_scales[rows],
            a_global if a_global is None or a_global.ndim == 0 else a_global[rows],
            b[group],
            None if b_scales is None else b_scales[group],
            None if b_global is None else b_global[group],
            None,
            int(k),
            out_dtype,
        )
        start = end
    return out

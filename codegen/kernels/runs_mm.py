"""Product of two half-precision matrices whose global scales change every 128 columns of the contraction: see `reference/runs.py`.

Each run is one dot from zero. Its sum is scaled in registers and added to the runs before it, so no epilogue has a scale left to apply.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_operand import load_columns, store_result
from fp4compile.codegen.kernels.scaled_mm import output_tile


@triton.jit
def runs_mm_kernel(
    a_ptr, a_global_ptr, b_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, k,
    a_stride_b, a_stride_r, a_global_stride_b, a_global_stride_r, a_global_stride_k,
    b_stride_b, b_stride_r, b_global_stride_b, b_global_stride_r, b_global_stride_k,
    bias_stride_b, bias_stride_m, bias_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """out (batch, M, N) contiguous = the sum over runs of A (batch, M, RUN) times B (batch, N, RUN) transposed, times both its scales.

    Rows of A and B are contiguous. MASKED: `k` is no multiple of RUN. Rows past the last read it again.
    """
    batch, m_tile, n_tile = output_tile(m, n, BLOCK_M, BLOCK_N)
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, RUN)
    a_row, b_row = tl.minimum(row, m - 1), tl.minimum(column, n - 1)
    a_at = a_ptr + batch * a_stride_b + a_row[:, None] * a_stride_r + inner[None, :]
    b_at = b_ptr + batch * b_stride_b + b_row[:, None] * b_stride_r + inner[None, :]
    a_global_at = a_global_ptr + batch * a_global_stride_b + a_row * a_global_stride_r
    b_global_at = b_global_ptr + batch * b_global_stride_b + b_row * b_global_stride_r
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, RUN):
        a = load_columns(a_at, inner, k - start, MASKED)
        b = load_columns(b_at, inner, k - start, MASKED)
        scale = tl.load(a_global_at)[:, None] * tl.load(b_global_at)[None, :]
        acc = acc + tl.dot(a, tl.trans(b)) * scale
        a_at += RUN
        b_at += RUN
        a_global_at += a_global_stride_k
        b_global_at += b_global_stride_k
    store_result(acc, bias_ptr, out_ptr, batch, row, column, m, n, bias_stride_b, bias_stride_m, bias_stride_n)

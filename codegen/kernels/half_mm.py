"""Product of two half-precision matrices with the epilogue of the block-scaled ones, for operands that were dequantized before.

Truth is `reference/matmul.py`, up to the order of the float32 sum. One program computes one tile of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_operand import load_columns, load_global_scale, store_result
from fp4compile.codegen.kernels.scaled_mm import output_tile


@triton.jit
def half_mm_kernel(
    a_ptr, a_global_ptr, b_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, k,
    a_stride_b, a_stride_r, a_stride_k, a_global_stride_b, a_global_stride_r,
    b_stride_b, b_stride_r, b_stride_k, b_global_stride_b, b_global_stride_r,
    bias_stride_b, bias_stride_m, bias_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """out (batch, M, N) contiguous = A (batch, M, K) times B (batch, N, K) transposed, times both global scales, plus bias.

    MASKED: `k` is no multiple of BLOCK_K. Rows past the last read it again.
    """
    batch, m_tile, n_tile = output_tile(m, n, BLOCK_M, BLOCK_N)
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_at = a_ptr + batch * a_stride_b + tl.minimum(row, m - 1)[:, None] * a_stride_r + inner[None, :] * a_stride_k
    b_at = b_ptr + batch * b_stride_b + tl.minimum(column, n - 1)[:, None] * b_stride_r + inner[None, :] * b_stride_k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        a = load_columns(a_at, inner, k - start, MASKED)
        b = load_columns(b_at, inner, k - start, MASKED)
        acc = tl.dot(a, tl.trans(b), acc)
        a_at += BLOCK_K * a_stride_k
        b_at += BLOCK_K * b_stride_k

    a_global = load_global_scale(a_global_ptr, batch, row, m, a_global_stride_b, a_global_stride_r, BLOCK_M)
    b_global = load_global_scale(b_global_ptr, batch, column, n, b_global_stride_b, b_global_stride_r, BLOCK_N)
    acc = acc * (a_global[:, None] * b_global[None, :])
    store_result(acc, bias_ptr, out_ptr, batch, row, column, m, n, bias_stride_b, bias_stride_m, bias_stride_n)

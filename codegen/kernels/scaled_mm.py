"""Block-scaled matrix product on tensor cores without FP4: both operands become exact bfloat16, float16 or float32 tiles.

Truth is `reference/matmul.py`, up to the order of the float32 sum. One program computes one tile of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_operand import (
    empty_sum,
    finished_sum,
    load_global_scale,
    load_operand,
    multiply_accumulate,
    store_result,
)


@triton.jit
def scaled_mm_kernel(
    a_ptr, a_scales_ptr, a_global_ptr, b_ptr, b_scales_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, k,
    a_stride_b, a_stride_r, a_stride_k, a_scale_stride_b, a_scale_stride_r, a_scale_stride_k, a_global_stride_b, a_global_stride_r,
    b_stride_b, b_stride_r, b_stride_k, b_scale_stride_b, b_scale_stride_r, b_scale_stride_k, b_global_stride_b, b_global_stride_r,
    bias_stride_b, bias_stride_m, bias_stride_n,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, B_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (batch, M, N) contiguous = A (batch, M, K) times B (batch, N, K) transposed, times both global scales, plus bias."""
    batch, m_tile, n_tile = output_tile(m, n, BLOCK_M, BLOCK_N)
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr += batch * a_stride_b
    b_ptr += batch * b_stride_b
    if A_FORMAT != "none":
        a_scales_ptr += batch * a_scale_stride_b
    if B_FORMAT != "none":
        b_scales_ptr += batch * b_scale_stride_b

    sums = empty_sum(B_FIRST, BLOCK_M, BLOCK_N)
    for start_k in range(0, k, BLOCK_K):
        a = load_operand(
            a_ptr, a_scales_ptr, row, m, start_k, k, a_stride_r, a_stride_k, a_scale_stride_r, a_scale_stride_k,
            A_FORMAT, DTYPE, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        b = load_operand(
            b_ptr, b_scales_ptr, column, n, start_k, k, b_stride_r, b_stride_k, b_scale_stride_r, b_scale_stride_k,
            B_FORMAT, DTYPE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sums = multiply_accumulate(sums, a, b, B_FIRST, PRECISION)

    a_global = load_global_scale(a_global_ptr, batch, row, m, a_global_stride_b, a_global_stride_r, BLOCK_M)
    b_global = load_global_scale(b_global_ptr, batch, column, n, b_global_stride_b, b_global_stride_r, BLOCK_N)
    acc = finished_sum(sums, B_FIRST) * (a_global[:, None] * b_global[None, :])
    store_result(acc, bias_ptr, out_ptr, batch, row, column, m, n, bias_stride_b, bias_stride_m, bias_stride_n)


@triton.jit
def output_tile(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(batch, row tile, column tile) of this program, int64. Eight row tiles run together, so that they find B's tiles in L2."""
    pid = tl.program_id(0).to(tl.int64)
    m_tiles = tl.cdiv(m, BLOCK_M)
    n_tiles = tl.cdiv(n, BLOCK_N)
    tile = pid % (m_tiles * n_tiles)
    band = 8 * n_tiles
    first = tile // band * 8
    height = tl.minimum(m_tiles - first, 8)
    return pid // (m_tiles * n_tiles), first + tile % band % height, tile % band // height

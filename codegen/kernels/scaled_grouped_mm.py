"""Grouped product for mixtures of experts: each program finds its expert from the offsets on the device, so the host never waits.

Truth is `reference/grouped.py`. The grid holds as many row tiles as any split of the rows can need, one partial tile per group more
than an undivided matrix; programs left over return at once. Rows past the last offset form one more group, whose product is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_operand import empty_sum, finished_sum, load_global_scale, load_operand, multiply_accumulate


@triton.jit
def scaled_grouped_mm_kernel(
    a_ptr, a_scales_ptr, a_global_ptr, b_ptr, b_scales_ptr, b_global_ptr, offs_ptr, out_ptr, total, groups, n, k,
    a_stride_r, a_stride_k, a_scale_stride_r, a_scale_stride_k, a_global_stride_r,
    b_stride_b, b_stride_r, b_stride_k, b_scale_stride_b, b_scale_stride_r, b_scale_stride_k, b_global_stride_b, b_global_stride_r,
    offs_stride,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, B_FIRST: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (T, N) contiguous: rows offs[g-1]..offs[g] of A (T, K) times B[g] (N, K) transposed. BLOCK_G > `groups`, a power of two."""
    pid = tl.program_id(0).to(tl.int64)
    n_tiles = tl.cdiv(n, BLOCK_N)
    group, first, end = _group_rows(offs_ptr, offs_stride, pid // n_tiles, total, groups, BLOCK_G, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = pid % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if group < groups:
        b_ptr += group * b_stride_b
        if B_FORMAT != "none":
            b_scales_ptr += group * b_scale_stride_b
        sums = empty_sum(B_FIRST, BLOCK_M, BLOCK_N)
        for start_k in range(0, k, BLOCK_K):
            a = load_operand(
                a_ptr, a_scales_ptr, row, end, start_k, k, a_stride_r, a_stride_k, a_scale_stride_r, a_scale_stride_k,
                A_FORMAT, DTYPE, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            b = load_operand(
                b_ptr, b_scales_ptr, column, n, start_k, k, b_stride_r, b_stride_k, b_scale_stride_r, b_scale_stride_k,
                B_FORMAT, DTYPE, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            sums = multiply_accumulate(sums, a, b, B_FIRST, PRECISION)
        a_global = load_global_scale(a_global_ptr, 0, row, end, 0, a_global_stride_r, BLOCK_M)
        b_global = load_global_scale(b_global_ptr, group, column, n, b_global_stride_b, b_global_stride_r, BLOCK_N)
        acc = finished_sum(sums, B_FIRST) * (a_global[:, None] * b_global[None, :])
    inside = (row < end)[:, None] & (column < n)[None, :]
    tl.store(out_ptr + row[:, None] * n + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _group_rows(offs_ptr, offs_stride, tile, total, groups, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group) of row tile `tile`; first >= end where the tile is one too many."""
    index = tl.arange(0, BLOCK_G)
    end = tl.load(offs_ptr + index * offs_stride, mask=index < groups, other=total).to(tl.int64)
    start = tl.load(offs_ptr + (index - 1) * offs_stride, mask=(index > 0) & (index <= groups), other=0).to(tl.int64)
    end = tl.minimum(end, total)
    start = tl.minimum(tl.where(index > groups, total, start), total)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    tiles_before = tl.cumsum(tiles, 0) - tiles
    here = (tiles_before <= tile) & (tile < tiles_before + tiles)
    group = tl.sum(tl.where(here, index, 0), 0)
    end_here = tl.sum(tl.where(here, end, 0), 0)
    first = tl.sum(tl.where(here, start + (tile - tiles_before) * BLOCK_M, 0), 0)
    return group.to(tl.int64), first, end_here


@triton.jit
def group_tiles_kernel(offs_ptr, offs_stride, out_ptr, total, groups, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """out (tiles, 3) int32: first row, end of the group and group of each tile of rows; first >= end where there is nothing to multiply."""
    tile = tl.program_id(0)
    group, first, end = _group_rows(offs_ptr, offs_stride, tile, total, groups, BLOCK_G, BLOCK_M)
    end = tl.where(group < groups, end, 0)
    tl.store(out_ptr + 3 * tile, first.to(tl.int32))
    tl.store(out_ptr + 3 * tile + 1, end.to(tl.int32))
    tl.store(out_ptr + 3 * tile + 2, tl.minimum(group, groups - 1).to(tl.int32))

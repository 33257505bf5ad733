"""Weight-only product for at most a few rows of x: the weight goes from 16-byte loads to the tensor core without leaving its registers.

One element of a tensor here is one thread's register. Every tensor ends in the dimensions (warps over rows, warps over k, 32 lanes), which
Triton's default layout spreads over the threads in that order; what stands before them lies in registers. So `mma.sync` can be written as
an elementwise operation, and no layout is ever converted in the loop. A cross-compile test reads that off the compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_decode import (
    decode_pair,
    decode_scales,
    finish,
    high_halves,
    load_scales,
    load_words,
    low_halves,
    mma,
    multiply_pairs,
    nan_flags,
    tiled_pair,
)  # fmt: skip


@triton.jit
def narrow_decode_mm_kernel(
    x_ptr, codes_ptr, scales_ptr, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, padded_k, a_global_stride, b_global_stride,
    STEPS: tl.constexpr, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, WARPS_R: tl.constexpr, WARPS_K: tl.constexpr,
    UNROLL: tl.constexpr, TILED: tl.constexpr, MASKED: tl.constexpr, FP16: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out (M, N) contiguous; x, codes and scales by pointers to bytes; x (M, `padded_k`) contiguous, a multiple of 32 (TILED: of 128) wide.

    In a turn a warp multiplies 16 ROW_TILES rows of the weight with 8 COLUMN_TILES rows of x over STEPS times 128 of k. The words of the
    next turn are loaded before those of this one are used. Lane 4 g + t owns rows g and g + 8 of a tile and 32 consecutive k of each step.
    """
    row_tile = tl.arange(0, ROW_TILES)[None, :, None, None, None, None]
    column_tile = tl.program_id(1) * COLUMN_TILES + tl.arange(0, COLUMN_TILES)[None, None, :, None, None, None]
    warp = tl.arange(0, WARPS_R)[None, None, None, :, None, None] * WARPS_K + tl.arange(0, WARPS_K)[None, None, None, None, :, None]
    thread = warp * 32 + tl.arange(0, 32)[None, None, None, None, None, :]
    lane = thread % 32
    tile = (tl.program_id(0) * WARPS_R + thread // (32 * WARPS_K)) * ROW_TILES + row_tile
    step = thread // 32 % WARPS_K * STEPS + tl.arange(0, STEPS)[:, None, None, None, None, None]
    k = step * 128 + lane % 4 * 32
    codes_0, codes_1, scales_0, scales_1 = _addresses(codes_ptr, scales_ptr, tile, step, lane, n, padded_k, TILED)
    x_row = tl.minimum(column_tile * 8 + lane // 4, m - 1).to(tl.int64)
    x_at = x_ptr + (x_row * padded_k + k) * 2

    d0 = tl.zeros([STEPS, ROW_TILES, COLUMN_TILES, WARPS_R, WARPS_K, 32], tl.float32)
    d1, d2, d3 = d0, d0, d0
    saw = tl.zeros([STEPS, ROW_TILES, 1, WARPS_R, WARPS_K, 32], tl.int32)
    TURN: tl.constexpr = 128 * STEPS * WARPS_K
    present = (k < padded_k).to(tl.int32)
    p0, p1, p2, p3, q0, q1, q2, q3, scales = _load(codes_0, codes_1, scales_0, scales_1, present, TILED, MASKED, PTX)
    if PDL:
        # The weight is older than the launch before this one; x, and whoever reads what `out` held, are not.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for done in tl.range(TURN, padded_k, TURN, loop_unroll_factor=UNROLL):
        codes_0 += TURN * 8 if TILED else TURN // 2
        codes_1 += TURN * 8 if TILED else TURN // 2
        scales_0 += TURN if TILED else TURN // 16
        scales_1 += TURN if TILED else TURN // 16
        later = (k + done < padded_k).to(tl.int32)
        n0, n1, n2, n3, o0, o1, o2, o3, new_scales = _load(codes_0, codes_1, scales_0, scales_1, later, TILED, MASKED, PTX)
        d0, d1, d2, d3 = _turn(d0, d1, d2, d3, p0, p1, p2, p3, q0, q1, q2, q3, scales, x_at, present, TILED, False, FP16, PTX)
        saw |= nan_flags(scales)
        x_at += TURN * 2
        p0, p1, p2, p3, q0, q1, q2, q3, scales, present = n0, n1, n2, n3, o0, o1, o2, o3, new_scales, later
    d0, d1, d2, d3 = _turn(d0, d1, d2, d3, p0, p1, p2, p3, q0, q1, q2, q3, scales, x_at, present, TILED, MASKED, FP16, PTX)
    d0, d1, d2, d3 = _spread_nan(d0, d1, d2, d3, saw | nan_flags(scales), FP16, PTX)
    _store_all(
        d0, d1, d2, d3, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, a_global_stride, b_global_stride,
        ROW_TILES, COLUMN_TILES, WARPS_R, FP16,
    )  # fmt: skip


@triton.jit
def _addresses(codes_ptr, scales_ptr, tile, step, lane, n, padded_k, TILED: tl.constexpr):
    """Where the words and scales of rows g and g + 8 of each `tile` begin for each lane. Rows past `n` read the last ones."""
    if TILED:
        at = tl.minimum(tile, tl.cdiv(n, 16) - 1).to(tl.int64) * (padded_k // 128) + step
        codes_0 = codes_ptr + at * 1024 + lane * 16
        scales_0 = scales_ptr + at * 128 + lane * 4
        return codes_0, codes_0 + 512, scales_0, scales_0
    else:
        k = step * 128 + lane % 4 * 32
        row_0 = tl.minimum(tile * 16 + lane // 4, n - 1).to(tl.int64)
        row_1 = tl.minimum(tile * 16 + lane // 4 + 8, n - 1).to(tl.int64)
        codes_0 = codes_ptr + row_0 * (padded_k // 2) + k // 2
        codes_1 = codes_ptr + row_1 * (padded_k // 2) + k // 2
        scales_0 = scales_ptr + row_0 * (padded_k // 16) + k // 16
        scales_1 = scales_ptr + row_1 * (padded_k // 16) + k // 16
        return codes_0, codes_1, scales_0, scales_1


@triton.jit
def _load(codes_0, codes_1, scales_0, scales_1, present, TILED: tl.constexpr, MASKED: tl.constexpr, PTX: tl.constexpr):
    """Four words of row g, four of row g + 8, and the two scale bytes of row g below the two of row g + 8."""
    p0, p1, p2, p3 = load_words(codes_0, present, MASKED, True, PTX)
    q0, q1, q2, q3 = load_words(codes_1, present, MASKED, True, PTX)
    if TILED:
        scales = load_scales(scales_0, present, 32, MASKED, PTX)
    else:
        scales = load_scales(scales_0, present, 16, MASKED, PTX) | (load_scales(scales_1, present, 16, MASKED, PTX) << 16)
    return p0, p1, p2, p3, q0, q1, q2, q3, scales


@triton.jit
def _turn(
    d0, d1, d2, d3, p0, p1, p2, p3, q0, q1, q2, q3, scales, x_at, present,
    TILED: tl.constexpr, MASKED: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Accumulators plus the products of words p (row g) and q (row g + 8) under their scales with x at byte `x_at`."""
    p_first, p_second = decode_scales(scales, FP16, PTX)
    q_first, q_second = decode_scales(scales >> 16, FP16, PTX)
    d0, d1, d2, d3 = _block(d0, d1, d2, d3, p0, p1, q0, q1, p_first, q_first, x_at, present, TILED, MASKED, FP16, PTX)
    return _block(d0, d1, d2, d3, p2, p3, q2, q3, p_second, q_second, x_at + 32, present, TILED, MASKED, FP16, PTX)


@triton.jit
def _block(
    d0, d1, d2, d3, p0, p1, q0, q1, p_scale, q_scale, x_at, present,
    TILED: tl.constexpr, MASKED: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sixteen codes of each row. The codes of a decoded pair are neighbours where TILED, else four apart; x is paired alike."""
    x0, x1, x2, x3 = load_words(x_at, present, MASKED, False, PTX)
    x4, x5, x6, x7 = load_words(x_at + 16, present, MASKED, False, PTX)
    if not TILED:
        x0, x1, x2, x3 = low_halves(x0, x2), high_halves(x0, x2), low_halves(x1, x3), high_halves(x1, x3)
        x4, x5, x6, x7 = low_halves(x4, x6), high_halves(x4, x6), low_halves(x5, x7), high_halves(x5, x7)
    d0, d1, d2, d3 = _step(d0, d1, d2, d3, p0, p1, q0, q1, p_scale, q_scale, x0, x1, 0, TILED, FP16, PTX)
    d0, d1, d2, d3 = _step(d0, d1, d2, d3, p0, p1, q0, q1, p_scale, q_scale, x2, x3, 2, TILED, FP16, PTX)
    d0, d1, d2, d3 = _step(d0, d1, d2, d3, p0, p1, q0, q1, p_scale, q_scale, x4, x5, 4, TILED, FP16, PTX)
    return _step(d0, d1, d2, d3, p0, p1, q0, q1, p_scale, q_scale, x6, x7, 6, TILED, FP16, PTX)


@triton.jit
def _step(
    d0, d1, d2, d3, p0, p1, q0, q1, p_scale, q_scale, b0, b1,
    PAIR: tl.constexpr, TILED: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One MMA: pairs PAIR and PAIR + 1 of each row with `b0` and `b1`."""
    a0 = multiply_pairs(_pair(p0, p1, PAIR, TILED, FP16), p_scale, FP16, PTX)
    a1 = multiply_pairs(_pair(q0, q1, PAIR, TILED, FP16), q_scale, FP16, PTX)
    a2 = multiply_pairs(_pair(p0, p1, PAIR + 1, TILED, FP16), p_scale, FP16, PTX)
    a3 = multiply_pairs(_pair(q0, q1, PAIR + 1, TILED, FP16), q_scale, FP16, PTX)
    return mma(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, FP16, PTX)


@triton.jit
def _pair(first, second, PAIR: tl.constexpr, TILED: tl.constexpr, FP16: tl.constexpr):
    if TILED:
        return tiled_pair(first, second, PAIR, FP16)
    else:
        return decode_pair(first if PAIR < 4 else second, PAIR % 4, FP16)


@triton.jit
def _spread_nan(d0, d1, d2, d3, saw, FP16: tl.constexpr, PTX: tl.constexpr):
    """A NaN scale makes its whole row NaN: NaN times zero in every column."""
    nan_0 = tl.where((saw & 0x8080) != 0, 0x7FFF7FFF, 0)
    nan_1 = tl.where(((saw >> 16) & 0x8080) != 0, 0x7FFF7FFF, 0)
    zero = tl.zeros_like(nan_0)
    return mma(d0, d1, d2, d3, nan_0, nan_1, zero, zero, zero, zero, FP16, PTX)


@triton.jit
def _store_all(
    d0, d1, d2, d3, a_global_ptr, b_global_ptr, bias_ptr, out_ptr, m, n, a_global_stride, b_global_stride,
    ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, WARPS_R: tl.constexpr, FP16: tl.constexpr,
):  # fmt: skip
    """Sums over steps and over the warps that share rows, in a fixed order; [row tiles, column tiles, warps over rows, lanes] remain."""
    d0, d1, d2, d3 = tl.reduce(tl.reduce((d0, d1, d2, d3), 0, _add_4), 3, _add_4)
    warp_r = tl.program_id(0) * WARPS_R + tl.arange(0, WARPS_R)[None, None, :, None]
    tile = warp_r * ROW_TILES + tl.arange(0, ROW_TILES)[:, None, None, None]
    lane = tl.arange(0, 32)[None, None, None, :]
    row = tile * 16 + lane // 4
    column = (tl.program_id(1) * COLUMN_TILES + tl.arange(0, COLUMN_TILES)[None, :, None, None]) * 8 + lane % 4 * 2
    d0 = finish(d0, a_global_ptr, b_global_ptr, bias_ptr, row, n, column, m, a_global_stride, b_global_stride, FP16)
    _store(d0, out_ptr, row, column, m, n)
    d1 = finish(d1, a_global_ptr, b_global_ptr, bias_ptr, row, n, column + 1, m, a_global_stride, b_global_stride, FP16)
    _store(d1, out_ptr, row, column + 1, m, n)
    d2 = finish(d2, a_global_ptr, b_global_ptr, bias_ptr, row + 8, n, column, m, a_global_stride, b_global_stride, FP16)
    _store(d2, out_ptr, row + 8, column, m, n)
    d3 = finish(d3, a_global_ptr, b_global_ptr, bias_ptr, row + 8, n, column + 1, m, a_global_stride, b_global_stride, FP16)
    _store(d3, out_ptr, row + 8, column + 1, m, n)


@triton.jit
def _add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _store(d, out_ptr, row, column, m, n):
    inside = (row < n) & (column < m)
    tl.store(out_ptr + column.to(tl.int64) * n + row, d.to(out_ptr.dtype.element_ty), mask=inside)

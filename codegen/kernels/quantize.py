"""Quantize kernels: truth is `reference/block.py`, and every bit agrees, so they must be compiled with `enable_fp_fusion=False`.

Three ways to the global scale S. It is known (static, or none: MXFP4); or a program finds the maximum that S is made of in what it
reads anyway, its own rows or a small matrix, and needs no other kernel; or `amax_kernel` has left the maxima of its programs behind, a few
hundred numbers that every program of the next kernel reduces. No number needs to be zero before, and nothing is atomic. A tensor is seen as
(batch, R, K) through its strides, K being the quantized axis, and rotated in registers. A program stays in one column of tiles, the second
dimension of the tiles of `_tile_load.py`, and steps along the first. Pointers to results are not known to be aligned, so that every lane
stores what it made: wider stores would move blocks between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_hadamard import rotate
from fp4compile.codegen.kernels._tile_load import load_tile, rotated
from fp4compile.codegen.kernels._tile_quantize import finite_max, quantize_tile
from fp4compile.codegen.kernels._tile_scale import encode_of, encode_scale, reciprocal, store_decode


@triton.jit
def amax_kernel(
    x_ptr, amax_ptr, plain_ptr, rows, k, a_tiles, stride_b, stride_r, stride_k,
    ACCESS: tl.constexpr, STRIDE_K: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """float32 maxima (batch, P) of the finite |x|, one a program; with `plain_ptr` also those before the rotation.

    Grid (tiles along B, steps, batch).
    """
    batch = tl.program_id(2)
    x_ptr += batch.to(tl.int64) * stride_b
    largest, plain = tl.zeros([A, B], tl.float32), tl.zeros([A, B], tl.float32)
    for tile in range(tl.program_id(1), a_tiles, tl.num_programs(1)):
        row, unit = corner(tile, tl.program_id(0), ACROSS, A, B)
        FIRST: tl.constexpr = HADAMARD if plain_ptr is None else 0
        x = load_tile(x_ptr, row, unit, rows, k, stride_r, stride_k, ACCESS, STRIDE_K, ACROSS, UNIT, FIRST, A, B)
        if plain_ptr is not None:
            plain = tl.maximum(plain, finite_max(x, A, B, UNIT))
            x = rotated(x, x_ptr.dtype.element_ty, HADAMARD, A, B, UNIT)
        largest = tl.maximum(largest, finite_max(x, A, B, UNIT))
    where = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(amax_ptr + where, tl.max(tl.max(largest, axis=1), axis=0))
    if plain_ptr is not None:
        tl.store(plain_ptr + where, tl.max(tl.max(plain, axis=1), axis=0))


@triton.jit(do_not_specialize_on_alignment=["seed_ptr", "codes_ptr", "scales_ptr"])
def quantize_kernel(
    x_ptr, amax_ptr, seed_ptr, codes_ptr, scales_ptr, decode_ptr, static_amax, parts, rows, k, groups, a_tiles,
    row_span, group_span, stride_b, stride_r, stride_k,
    FORMAT: tl.constexpr, BOUND: tl.constexpr, IS_TILE: tl.constexpr, SCALE_RULE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SWIZZLED: tl.constexpr, CAPABILITY: tl.constexpr, MOST_PARTS: tl.constexpr,
    ACCESS: tl.constexpr, STRIDE_K: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Codes (batch, R, Kp/2), scale bytes (batch, R, Kp/block) or swizzled, decode multipliers (batch). Grid as `amax_kernel`'s.

    `amax_ptr` (batch, parts) as `amax_kernel` leaves it; None: S is made of `static_amax`. Tiles run backwards, for the last ones that
    `amax_kernel` read are still in L2.
    """
    batch = tl.program_id(2)
    encode = encode_of(amax_ptr, static_amax, batch, parts, FORMAT, BOUND, MOST_PARTS)
    decode = reciprocal(encode, CAPABILITY)
    store_decode(decode_ptr, decode, batch, tl.program_id(0) + tl.program_id(1))
    x_ptr += batch.to(tl.int64) * stride_b
    for back in range(tl.program_id(1), a_tiles, tl.num_programs(1)):
        row, unit = corner(a_tiles - 1 - back, tl.program_id(0), ACROSS, A, B)
        x = load_tile(x_ptr, row, unit, rows, k, stride_r, stride_k, ACCESS, STRIDE_K, ACROSS, UNIT, HADAMARD, A, B)
        quantize_tile(
            x, encode, decode, seed_ptr, codes_ptr, scales_ptr, batch, row, unit, rows, groups, row_span, group_span,
            FORMAT, SCALE_RULE, IS_TILE, STOCHASTIC, SWIZZLED, CAPABILITY, ACROSS, UNIT, A, B,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["seed_ptr", "codes_ptr", "scales_ptr"])
def quantize_here_kernel(
    x_ptr, seed_ptr, codes_ptr, scales_ptr, decode_ptr, rows, k, groups, row_span, group_span, stride_b, stride_r, stride_k,
    BOUND: tl.constexpr, IS_TILE: tl.constexpr, SCALE_RULE: tl.constexpr, STOCHASTIC: tl.constexpr, SWIZZLED: tl.constexpr,
    CAPABILITY: tl.constexpr, PER_ROW: tl.constexpr, ROW_TILES: tl.constexpr, UNIT_TILES: tl.constexpr,
    ACCESS: tl.constexpr, STRIDE_K: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """NVFP4 of a tile of whole rows a program, grid (row tiles, batch), with S of each row, or of a small matrix.

    First the program reads what S is made of, its UNIT_TILES tiles, or those of all ROW_TILES of x; then its own again, from a cache,
    unless it was one.
    """
    row_tile, batch = tl.program_id(0), tl.program_id(1)
    x_ptr += batch.to(tl.int64) * stride_b
    SIZE: tl.constexpr = B if ACROSS else A
    STEP: tl.constexpr = A if ACROSS else B
    COUNT: tl.constexpr = UNIT_TILES if PER_ROW else ROW_TILES * UNIT_TILES
    # Unrolled, so that loads are under way together. But units of 64 and more are many loads, and Triton's time grows faster than their
    # square, to minutes: for them the loop is left as it is and has no first round of its own.
    BEGUN: tl.constexpr = 0 if UNIT >= 64 and COUNT > 1 else 1
    MOST: tl.constexpr = 1 if UNIT >= 64 else COUNT - 1 if COUNT <= 16 else 4
    if BEGUN == 0:
        largest = tl.full([A, B], 0.0, tl.float32)
    else:
        first_row = row_tile * SIZE if PER_ROW else 0
        x = load_tile(x_ptr, first_row, 0, rows, k, stride_r, stride_k, ACCESS, STRIDE_K, ACROSS, UNIT, HADAMARD, A, B)
        largest = finite_max(x, A, B, UNIT)
    for tile in tl.range(BEGUN, COUNT, loop_unroll_factor=MOST if MOST > 1 else 1):
        row = (row_tile if PER_ROW else tile // UNIT_TILES) * SIZE
        unit = tile % UNIT_TILES * STEP
        x = load_tile(x_ptr, row, unit, rows, k, stride_r, stride_k, ACCESS, STRIDE_K, ACROSS, UNIT, HADAMARD, A, B)
        largest = tl.maximum(largest, finite_max(x, A, B, UNIT))
    row = row_tile * SIZE
    if PER_ROW and SIZE > 1:
        amax = tl.max(largest, axis=0)[None, :] if ACROSS else tl.max(largest, axis=1)[:, None]
    else:
        amax = tl.full([1, 1], 0.0, tl.float32) + tl.max(tl.max(largest, axis=1), axis=0)
    encode = encode_scale(amax, BOUND)
    decode = reciprocal(encode, CAPABILITY)
    if PER_ROW:
        each = row + (tl.arange(0, SIZE)[None, :] if ACROSS else tl.arange(0, SIZE)[:, None])
        tl.store(decode_ptr + batch * rows + each, decode, mask=each < rows)
    else:
        store_decode(decode_ptr, decode, batch, row_tile)
    for unit_tile in range(UNIT_TILES):
        unit = unit_tile * STEP
        if COUNT > 1:
            x = load_tile(x_ptr, row, unit, rows, k, stride_r, stride_k, ACCESS, STRIDE_K, ACROSS, UNIT, HADAMARD, A, B)
        quantize_tile(
            x, encode, decode, seed_ptr, codes_ptr, scales_ptr, batch, row, unit, rows, groups, row_span, group_span,
            "nvfp4", SCALE_RULE, IS_TILE, STOCHASTIC, SWIZZLED, CAPABILITY, ACROSS, UNIT, A, B,
        )  # fmt: skip


@triton.jit
def corner(a_tile, b_tile, ACROSS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """First row and unit of a tile."""
    if ACROSS:
        return b_tile * B, a_tile * A
    else:
        return a_tile * A, b_tile * B


@triton.jit
def hadamard_kernel(
    x_ptr, out_ptr, rows, k, padded_k, stride_b, stride_r, stride_k, out_stride_b, out_stride_r, out_stride_k,
    HADAMARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rotated matrix (batch, R, Kp) in the input's dtype, through the output's own strides."""
    pid = tl.program_id(0).to(tl.int64)
    k_tiles, row_tiles = tl.cdiv(padded_k, BLOCK_K), tl.cdiv(rows, BLOCK_R)
    batch = pid // k_tiles // row_tiles
    row = pid // k_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    column = pid % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + batch * stride_b + row[:, None] * stride_r + column[None, :] * stride_k, mask=inside, other=0.0)
    x = rotate(x.to(tl.float32), HADAMARD, BLOCK_R, BLOCK_K).to(x_ptr.dtype.element_ty)
    where = batch * out_stride_b + row[:, None] * out_stride_r + column[None, :] * out_stride_k
    tl.store(out_ptr + where, x, mask=(row < rows)[:, None] & (column < padded_k)[None, :])

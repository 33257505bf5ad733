"""Quantize kernels: truth is `reference/block.py`, and every bit agrees, so they must be compiled with `enable_fp_fusion=False`.

Three ways to the global scale S. It is known (static, or none: MXFP4); or a program finds the maximum that S is made of in what it
reads anyway, its own rows or a small matrix, and needs no other kernel; or `amax_kernel` has left the maxima of its programs behind, a few
hundred numbers that every program of the next kernel reduces. No number needs to be zero before, and nothing is atomic. A tensor is seen as
(batch, R, K) through its strides, K being the quantized axis, and rotated in registers.
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
    x_ptr, amax_ptr, plain_ptr, rows, k, row_tiles, unit_tiles, stride_b, stride_r, stride_k,
    ACCESS: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """float32 maxima (batch, P) of the finite |x|, one a program, of grid (P, batch); with `plain_ptr` also those before the rotation."""
    part, batch = tl.program_id(0), tl.program_id(1)
    x_ptr += batch.to(tl.int64) * stride_b
    largest, plain = tl.zeros([A, B], tl.float32), tl.zeros([A, B], tl.float32)
    for tile in range(part, row_tiles * unit_tiles, tl.num_programs(0)):
        row, unit = _corner(tile, unit_tiles, ACROSS, A, B)
        if plain_ptr is None:
            x = load_tile(x_ptr, row, unit, rows, k, stride_r, stride_k, ACCESS, ACROSS, UNIT, HADAMARD, A, B)
        else:
            x = load_tile(x_ptr, row, unit, rows, k, stride_r, stride_k, ACCESS, ACROSS, UNIT, 0, A, B)
            plain = tl.maximum(plain, finite_max(x, A, B, UNIT))
            x = rotated(x, x_ptr.dtype.element_ty, HADAMARD, A, B, UNIT)
        largest = tl.maximum(largest, finite_max(x, A, B, UNIT))
    where = batch * tl.num_programs(0) + part
    tl.store(amax_ptr + where, tl.max(tl.max(largest, axis=1), axis=0))
    if plain_ptr is not None:
        tl.store(plain_ptr + where, tl.max(tl.max(plain, axis=1), axis=0))


@triton.jit(do_not_specialize_on_alignment=["codes_ptr", "scales_ptr"])  # each lane stores what it made: wider stores would reshuffle
def quantize_kernel(
    x_ptr, amax_ptr, seed_ptr, codes_ptr, scales_ptr, decode_ptr, static_amax, parts, rows, k, groups, row_tiles, unit_tiles, tiles,
    row_span, group_span, stride_b, stride_r, stride_k,
    FORMAT: tl.constexpr, BOUND: tl.constexpr, IS_TILE: tl.constexpr, SCALE_RULE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SWIZZLED: tl.constexpr, CAPABILITY: tl.constexpr, MOST_PARTS: tl.constexpr, ONE_MATRIX: tl.constexpr,
    ACCESS: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Codes (batch, R, Kp/2), scale bytes (batch, R, Kp/block) or swizzled, decode multipliers (batch).

    `amax_ptr` (batch, parts) as `amax_kernel` leaves it; None: S is made of `static_amax`. Tiles run backwards, for the last ones that
    `amax_kernel` read are still in L2.
    """
    encode = encode_of(amax_ptr, static_amax, 0, parts, FORMAT, BOUND, MOST_PARTS)
    decode = reciprocal(encode, CAPABILITY)
    for back in range(tl.program_id(0), tiles, tl.num_programs(0)):
        index = tiles - 1 - back
        batch = index // (row_tiles * unit_tiles)
        row, unit = _corner(index % (row_tiles * unit_tiles), unit_tiles, ACROSS, A, B)
        if not ONE_MATRIX:
            encode = encode_of(amax_ptr, static_amax, batch, parts, FORMAT, BOUND, MOST_PARTS)
            decode = reciprocal(encode, CAPABILITY)
        store_decode(decode_ptr, decode, batch, row + unit, FORMAT)
        base = x_ptr + tl.cast(batch, tl.int64) * stride_b
        x = load_tile(base, row, unit, rows, k, stride_r, stride_k, ACCESS, ACROSS, UNIT, HADAMARD, A, B)
        quantize_tile(
            x, encode, decode, seed_ptr, codes_ptr, scales_ptr, batch, row, unit, rows, groups, row_span, group_span,
            FORMAT, SCALE_RULE, IS_TILE, STOCHASTIC, SWIZZLED, CAPABILITY, ACROSS, UNIT, A, B,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["codes_ptr", "scales_ptr"])  # each lane stores what it made: wider stores would reshuffle
def quantize_here_kernel(
    x_ptr, seed_ptr, codes_ptr, scales_ptr, decode_ptr, rows, k, groups, row_tiles, unit_tiles, row_span, group_span,
    stride_b, stride_r, stride_k,
    BOUND: tl.constexpr, IS_TILE: tl.constexpr, SCALE_RULE: tl.constexpr, STOCHASTIC: tl.constexpr, SWIZZLED: tl.constexpr,
    CAPABILITY: tl.constexpr, PER_ROW: tl.constexpr, ONE_TILE: tl.constexpr,
    ACCESS: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """NVFP4 of a tile of rows a program, grid (row tiles, batch), with S of each row, or of the matrix, which every program reads whole.

    ONE_TILE: what S is made of is the tile itself. Otherwise its second reading finds it in a cache.
    """
    row_tile, batch = tl.program_id(0), tl.program_id(1)
    x_ptr += batch.to(tl.int64) * stride_b
    SIZE: tl.constexpr = B if ACROSS else A
    x = load_tile(x_ptr, row_tile * SIZE, 0, rows, k, stride_r, stride_k, ACCESS, ACROSS, UNIT, HADAMARD, A, B)
    largest = finite_max(x, A, B, UNIT)
    if not ONE_TILE:
        first = row_tile if PER_ROW else 0
        for tile in range(first * unit_tiles, (first + 1 if PER_ROW else row_tiles) * unit_tiles):
            row, unit = _corner(tile, unit_tiles, False, SIZE, A if ACROSS else B)
            x = load_tile(x_ptr, row, unit, rows, k, stride_r, stride_k, ACCESS, ACROSS, UNIT, HADAMARD, A, B)
            largest = tl.maximum(largest, finite_max(x, A, B, UNIT))
    if PER_ROW:
        amax = tl.max(largest, axis=0)[None, :] if ACROSS else tl.max(largest, axis=1)[:, None]
    else:
        amax = tl.full([1, 1], 0.0, tl.float32) + tl.max(tl.max(largest, axis=1), axis=0)
    encode = encode_scale(amax, BOUND)
    decode = reciprocal(encode, CAPABILITY)
    if PER_ROW:
        row = row_tile * SIZE + (tl.arange(0, SIZE)[None, :] if ACROSS else tl.arange(0, SIZE)[:, None])
        tl.store(decode_ptr + batch * rows + row, decode, mask=row < rows)
    else:
        store_decode(decode_ptr, decode, batch, row_tile, "nvfp4")
    for unit_tile in range(unit_tiles):
        unit = unit_tile * (A if ACROSS else B)
        if not ONE_TILE:
            x = load_tile(x_ptr, row_tile * SIZE, unit, rows, k, stride_r, stride_k, ACCESS, ACROSS, UNIT, HADAMARD, A, B)
        quantize_tile(
            x, encode, decode, seed_ptr, codes_ptr, scales_ptr, batch, row_tile * SIZE, unit, rows, groups, row_span, group_span,
            "nvfp4", SCALE_RULE, IS_TILE, STOCHASTIC, SWIZZLED, CAPABILITY, ACROSS, UNIT, A, B,
        )  # fmt: skip


@triton.jit
def _corner(tile, unit_tiles, ACROSS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """First row and unit of tile number `tile`."""
    row_tile, unit_tile = tile // unit_tiles, tile % unit_tiles
    if ACROSS:
        return row_tile * B, unit_tile * A
    else:
        return row_tile * A, unit_tile * B


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

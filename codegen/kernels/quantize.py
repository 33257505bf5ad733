"""Block quantization in two kernels: the maximum magnitude that a global scale is made of, then scales and codes.

Truth is `reference/block.py`; every bit agrees, so these kernels must be compiled with `enable_fp_fusion=False`. Both load a tile of
the matrix seen as (batch, R, K) through its strides, whichever of the two is contiguous, and rotate it if asked, so that the rotated
tensor is never stored. Elements outside the matrix are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_block import block_error, block_max, random_bytes
from fp4compile.codegen.kernels._tile_e2m1 import encode_nearest, encode_stochastic, pack
from fp4compile.codegen.kernels._tile_hadamard import rotate
from fp4compile.codegen.kernels._tile_minifloat import bits_float, magnitude_bits
from fp4compile.codegen.kernels._tile_scale import cap, decode_e4m3, encode_e4m3, encode_scale, reciprocal


@triton.jit
def amax_kernel(
    x_ptr, amax_ptr, rows, k, padded_k, stride_b, stride_r, stride_k,
    PER_ROW: tl.constexpr, HADAMARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maximum finite |x| into `amax_ptr`, int32 bits that start at 0: one a matrix, or one a row. Integer order is magnitude order."""
    batch, row_tile, k_tile = tile_index(rows, padded_k, BLOCK_R, BLOCK_K)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    x = load_rotated(x_ptr + batch * stride_b, row, k_tile, rows, k, stride_r, stride_k, HADAMARD, BLOCK_R, BLOCK_K)
    magnitude = magnitude_bits(x.to(tl.float32))
    finite = tl.where(magnitude < 0x7F800000, magnitude, 0)
    row_max = tl.max(finite, axis=1)
    if PER_ROW:
        tl.atomic_max(amax_ptr + batch * rows + row, row_max, mask=row < rows, sem="relaxed")
    else:
        tl.atomic_max(amax_ptr + batch, tl.max(row_max, axis=0), sem="relaxed")


@triton.jit
def nvfp4_kernel(
    x_ptr, amax_ptr, seed_ptr, codes_ptr, scales_ptr, decode_ptr, rows, k, padded_k, stride_b, stride_r, stride_k,
    BOUND: tl.constexpr, IS_TILE: tl.constexpr, SCALE_RULE: tl.constexpr, PER_ROW: tl.constexpr, STOCHASTIC: tl.constexpr,
    HADAMARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes (batch, R, Kp/2), e4m3 scale bytes (batch, R, Kp/16), decode multipliers shaped as `amax_ptr`: (batch) or (batch, R)."""
    GROUPS: tl.constexpr = BLOCK_K // 16
    batch, row_tile, k_tile = tile_index(rows, padded_k, BLOCK_R, BLOCK_K)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    x = load_rotated(x_ptr + batch * stride_b, row, k_tile, rows, k, stride_r, stride_k, HADAMARD, BLOCK_R, BLOCK_K)
    x = tl.reshape(x.to(tl.float32), [BLOCK_R, GROUPS, 16])

    if PER_ROW:
        owner = batch * rows + row
        owners = rows
        amax = tl.load(amax_ptr + owner, mask=row < rows, other=0)
    else:
        owner = batch + 0 * row
        owners = 1
        amax = tl.load(amax_ptr + owner)
    by_row = encode_scale(bits_float(amax), BOUND)  # S
    decode_by_row = reciprocal(by_row)
    tl.store(decode_ptr + owner, decode_by_row, mask=row < tl.where(k_tile == 0, owners, 0))  # the first tile of each row writes

    largest = block_max(magnitude_bits(x), IS_TILE, BLOCK_R, GROUPS)  # [R, K/16], NaN above Inf above every number
    target = bits_float(largest) * (by_row * 0.1666666716337204)[:, None]  # float32(1/6)
    if SCALE_RULE == "amax_17_16":
        target = target * 1.0625
    byte = encode_e4m3(target)
    y = _into_range(x, byte, decode_by_row)
    if STOCHASTIC:
        codes = encode_stochastic(y, _random(seed_ptr, batch, row, k_tile, rows, padded_k, GROUPS))
    else:
        codes = encode_nearest(y)
    if SCALE_RULE != "amax" and SCALE_RULE != "amax_17_16":
        byte_4 = encode_e4m3(target * 1.5)
        codes_4 = encode_nearest(_into_range(x, byte_4, decode_by_row))
        scaled = x * by_row[:, None, None]
        error_6 = block_error(scaled, codes, decode_e4m3(byte), SCALE_RULE, IS_TILE, BLOCK_R, GROUPS)
        error_4 = block_error(scaled, codes_4, decode_e4m3(byte_4), SCALE_RULE, IS_TILE, BLOCK_R, GROUPS)
        take_4 = error_4 < error_6
        byte = tl.where(take_4, byte_4, byte)
        codes = tl.where(take_4[:, :, None], codes_4, codes)

    byte = tl.where(largest < 0x7F800000, byte, 0x7F)
    _store(codes_ptr, scales_ptr, codes, byte, batch, row, k_tile, rows, padded_k, 16, BLOCK_R, BLOCK_K)


@triton.jit
def mxfp4_kernel(
    x_ptr, seed_ptr, codes_ptr, scales_ptr, rows, k, padded_k, stride_b, stride_r, stride_k,
    STOCHASTIC: tl.constexpr, HADAMARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes (batch, R, Kp/2) and e8m0 scale bytes (batch, R, Kp/32): OCP Microscaling 1.0 with a floor exponent."""
    GROUPS: tl.constexpr = BLOCK_K // 32
    batch, row_tile, k_tile = tile_index(rows, padded_k, BLOCK_R, BLOCK_K)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    x = load_rotated(x_ptr + batch * stride_b, row, k_tile, rows, k, stride_r, stride_k, HADAMARD, BLOCK_R, BLOCK_K)
    x = tl.reshape(x.to(tl.float32), [BLOCK_R, GROUPS, 32])

    largest = tl.max(magnitude_bits(x), axis=2)
    byte = tl.maximum((largest >> 23) - 2, 0)  # e2m1's own largest exponent is 2
    y = x * bits_float((254 - byte) << 23)[:, :, None]  # times 2^(127 - byte)
    if STOCHASTIC:
        drawn = _random(seed_ptr, batch, row, k_tile, rows, padded_k, BLOCK_K // 16)
        codes = encode_stochastic(y, tl.reshape(drawn, [BLOCK_R, GROUPS, 32]))
    else:
        codes = encode_nearest(y)
    byte = tl.where(largest < 0x7F800000, byte, 0xFF)
    _store(codes_ptr, scales_ptr, codes, byte, batch, row, k_tile, rows, padded_k, 32, BLOCK_R, BLOCK_K)


@triton.jit
def hadamard_kernel(
    x_ptr, out_ptr, rows, k, padded_k, stride_b, stride_r, stride_k, out_stride_b, out_stride_r, out_stride_k,
    HADAMARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rotated matrix (batch, R, Kp) in the input's dtype, through the output's own strides."""
    batch, row_tile, k_tile = tile_index(rows, padded_k, BLOCK_R, BLOCK_K)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    column = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    x = load_rotated(x_ptr + batch * stride_b, row, k_tile, rows, k, stride_r, stride_k, HADAMARD, BLOCK_R, BLOCK_K)
    where = batch * out_stride_b + row[:, None] * out_stride_r + column[None, :] * out_stride_k
    tl.store(out_ptr + where, x, mask=(row < rows)[:, None] & (column < padded_k)[None, :])


@triton.jit
def tile_index(rows, padded_k, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """(batch, row tile, k tile) of this program, int64; a matrix without elements still has one program, which writes its global scale."""
    pid = tl.program_id(0).to(tl.int64)
    k_tiles = tl.maximum(tl.cdiv(padded_k, BLOCK_K), 1)
    row_tiles = tl.maximum(tl.cdiv(rows, BLOCK_R), 1)
    return pid // k_tiles // row_tiles, pid // k_tiles % row_tiles, pid % k_tiles


@triton.jit
def load_rotated(
    x_ptr, row, k_tile, rows, k, stride_r, stride_k, HADAMARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Tile [BLOCK_R, BLOCK_K] in the input's dtype, rotated and rounded to it; zero outside the matrix."""
    column = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_r + column[None, :] * stride_k, mask=inside, other=0.0)
    if HADAMARD > 0:
        x = rotate(x.to(tl.float32), HADAMARD, BLOCK_R, BLOCK_K).to(x_ptr.dtype.element_ty)
    return x


@triton.jit
def _into_range(x, byte, decode_by_row):
    """`x` [R, GROUPS, 16] divided by its block and global scales, as a product with the rounded reciprocal."""
    multiplier = cap(reciprocal(decode_e4m3(byte) * decode_by_row[:, None]))
    return x * multiplier[:, :, None]


@triton.jit
def _random(seed_ptr, batch, row, k_tile, rows, padded_k, GROUPS: tl.constexpr):
    """Random bytes of the tile, [R, GROUPS, 16], numbered by groups of 16 elements of the padded (batch, R, Kp) tensor."""
    group = (batch * rows + row)[:, None] * (padded_k // 16) + (k_tile * GROUPS + tl.arange(0, GROUPS))[None, :]
    return random_bytes(tl.load(seed_ptr), group)


@triton.jit
def _store(
    codes_ptr, scales_ptr, codes, byte, batch, row, k_tile, rows, padded_k,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // BLOCK
    packed = pack(codes, BLOCK_R, BLOCK_K)
    out_row = (batch * rows + row)[:, None]
    inside = (row < rows)[:, None]
    pair = (k_tile * PAIRS + tl.arange(0, PAIRS))[None, :]
    tl.store(codes_ptr + out_row * (padded_k // 2) + pair, packed, mask=inside & (pair < padded_k // 2))
    group = (k_tile * GROUPS + tl.arange(0, GROUPS))[None, :]
    tl.store(scales_ptr + out_row * (padded_k // BLOCK) + group, byte.to(tl.uint8), mask=inside & (group < padded_k // BLOCK))

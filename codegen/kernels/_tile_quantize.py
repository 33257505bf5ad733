"""Blocks of a tile to scale bytes and codes, and both to memory: what every quantize kernel does once the global scale is known."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_block import block_error, block_max, lane_max, random_fractions
from fp4compile.codegen.kernels._tile_e2m1 import (
    nearest_codes,
    nearest_values,
    stochastic_codes,
    words_by_hardware,
    words_of_codes,
    words_of_values,
)
from fp4compile.codegen.kernels._tile_eden import eden_groups
from fp4compile.codegen.kernels._tile_minifloat import bits_float, float_bits
from fp4compile.codegen.kernels._tile_scale import cap, reciprocal, round_e4m3, swizzled_offset


@triton.jit
def quantize_tile(
    x, encode, decode, seed_ptr, codes_ptr, scales_ptr, batch, row, unit, rows, groups, row_span, group_span,
    FORMAT: tl.constexpr, SCALE_RULE: tl.constexpr, IS_TILE: tl.constexpr, STOCHASTIC: tl.constexpr, SWIZZLED: tl.constexpr,
    CAPABILITY: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Quantize and store `x` [A, B, UNIT], whose first row and unit are `row` and `unit` of matrix `batch`.

    `encode` and `decode`, S and its reciprocal, broadcast to [A, B]. `groups` are the blocks of a row; scales are stored, as zeros, up to
    (`row_span`, `group_span`). SCALE_RULE "eden" stands for the rounding of that name.
    """
    BLOCK: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    GROUPS_A: tl.constexpr = A * (UNIT // BLOCK) if ACROSS else A
    GROUPS_B: tl.constexpr = B if ACROSS else B * (UNIT // BLOCK)
    ROWS: tl.constexpr = GROUPS_B if ACROSS else GROUPS_A
    GROUPS: tl.constexpr = GROUPS_A if ACROSS else GROUPS_B
    first_group = unit * (UNIT // BLOCK)
    if SCALE_RULE == "eden":
        tl.static_assert(UNIT == 128)
        codes, byte = eden_groups(x, encode, decode, seed_ptr, batch, row, unit, rows, groups, CAPABILITY, ACROSS, A, B)
        if ACROSS:
            codes, byte = tl.permute(codes, (0, 2, 1)), tl.permute(byte, (0, 2, 1))
        codes, byte = tl.reshape(codes, [GROUPS_A, GROUPS_B]), tl.reshape(byte, [GROUPS_A, GROUPS_B])
    else:
        if ACROSS and UNIT > BLOCK:
            x = tl.permute(tl.reshape(x, [A, B, UNIT // BLOCK, BLOCK]), (0, 2, 1, 3))
        x = tl.reshape(x, [GROUPS_A, GROUPS_B, BLOCK])
        random = 0.0
        if STOCHASTIC:
            random = _random(seed_ptr, batch, row, first_group, rows, groups, BLOCK, ACROSS, GROUPS_A, GROUPS_B)
        if FORMAT == "nvfp4":
            TILE: tl.constexpr = (2 if ACROSS else 1) if IS_TILE else 0
            codes, byte = _nvfp4_blocks(x, encode, decode, random, SCALE_RULE, TILE, STOCHASTIC, CAPABILITY, GROUPS_A, GROUPS_B)
        else:
            codes, byte = _mxfp4_blocks(x, random, STOCHASTIC, CAPABILITY, GROUPS_A, GROUPS_B)
    _store(
        codes_ptr, scales_ptr, codes, byte, batch, row, first_group, rows, groups, row_span, group_span,
        BLOCK, SWIZZLED, ACROSS, ROWS, GROUPS,
    )  # fmt: skip


@triton.jit
def finite_max(x, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr):
    """Largest finite |x| of each lane, [A, B]."""
    magnitude = tl.abs(x)
    return lane_max(tl.where(magnitude < float("inf"), magnitude, 0.0), A, B, UNIT)


@triton.jit
def _nvfp4_blocks(
    x, encode, decode, random, SCALE_RULE: tl.constexpr, TILE: tl.constexpr, STOCHASTIC: tl.constexpr, CAPABILITY: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Codes, int64 [A, B], and e4m3 bytes, int32 [A, B], of `x` [A, B, 16]."""
    magnitude = tl.abs(x)
    largest = block_max(magnitude, TILE, A, B, 16)
    target = largest * (encode * 0.1666666716337204)  # float32(1/6)
    if SCALE_RULE == "amax_17_16":
        target = target * 1.0625
    byte, scale = round_e4m3(target, CAPABILITY)
    multiplier = _multiplier(scale, decode, CAPABILITY)
    if SCALE_RULE == "amax" or SCALE_RULE == "amax_17_16":
        words = _words(x, multiplier, random, STOCHASTIC, CAPABILITY, A, B, 16)
    else:
        byte_4, scale_4 = round_e4m3(target * 1.5, CAPABILITY)
        scaled = magnitude * encode[:, :, None]
        value = nearest_values(tl.minimum(magnitude * multiplier[:, :, None], 6.0))
        # Under a scale of its own the block maximum is at most 6 here, and under the same as above the first wins.
        differ = byte_4 != byte
        value_4 = nearest_values(magnitude * _multiplier(scale_4, decode, CAPABILITY)[:, :, None])
        # A value times its scale has six significant bits: these FMAs round once, as a product and a difference would.
        error = block_error(tl.fma(value, -scale[:, :, None], scaled), SCALE_RULE, TILE, A, B)
        error_4 = block_error(tl.fma(value_4, -scale_4[:, :, None], scaled), SCALE_RULE, TILE, A, B)
        take_4 = (error_4 < error) & differ
        byte = tl.where(take_4, byte_4, byte)
        value = tl.where(take_4[:, :, None], value_4, value)
        words = words_of_values(value * 1.1754943508222875e-38, x, CAPABILITY, A, B, 16)  # 2^-126
    words = tl.where((largest != largest)[:, :, None], 0x77777777, words)
    byte = tl.where(largest < float("inf"), byte, 0x7F)
    return _two_words(words), byte


@triton.jit
def _multiplier(scale, decode, CAPABILITY: tl.constexpr):
    """What an element is multiplied by, in place of a division by its block and global scales."""
    return cap(reciprocal(scale * decode, CAPABILITY))


@triton.jit
def _mxfp4_blocks(x, random, STOCHASTIC: tl.constexpr, CAPABILITY: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Codes, int64 [A, 2 B] or [2 A, B], and e8m0 bytes, int32 [A, B], of `x` [A, B, 32]: OCP Microscaling 1.0 with a floor exponent."""
    largest = float_bits(lane_max(tl.abs(x), A, B, 32))
    byte = tl.maximum((largest >> 23) - 2, 0)  # e2m1's own largest exponent is 2
    multiplier = bits_float((254 - byte) << 23)  # 2^(127 - byte)
    x = tl.minimum(x, float("inf"))  # a NaN becomes Inf, which has the same code and no sign
    words = _words(x, multiplier, random, STOCHASTIC, CAPABILITY, A, B, 32)
    return words, tl.where(largest < 0x7F800000, byte, 0xFF)


@triton.jit
def _words(x, multiplier, random, STOCHASTIC: tl.constexpr, CAPABILITY: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """int32 [A, B, N / 8], eight codes a word."""
    if STOCHASTIC:
        return words_of_codes(stochastic_codes(tl.abs(x) * multiplier[:, :, None], random, CAPABILITY), x, CAPABILITY, A, B, N)
    elif CAPABILITY >= 100:
        return words_by_hardware(x * multiplier[:, :, None], A, B, N)
    else:
        return words_of_codes(nearest_codes(tl.abs(x) * multiplier[:, :, None], CAPABILITY), x, CAPABILITY, A, B, N)


@triton.jit
def _two_words(words):
    """int64 of the pairs in the last dimension of int32 `words`, which is lost."""
    low, high = tl.split(words)
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def _random(
    seed_ptr, batch, row, group, rows, groups, BLOCK: tl.constexpr, ACROSS: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Random numbers of the tile, [A, B, BLOCK], counted by groups of 16 elements of the padded (batch, R, Kp) tensor."""
    SIXTEENS: tl.constexpr = BLOCK // 16
    if ACROSS:
        where = (batch * rows + row + tl.arange(0, B))[None, :] * groups + (group + tl.arange(0, A))[:, None]
    else:
        where = (batch * rows + row + tl.arange(0, A))[:, None] * groups + (group + tl.arange(0, B))[None, :]
    seed = tl.load(seed_ptr)
    if SIXTEENS == 1:
        return random_fractions(seed, where, A, B)
    else:
        both = tl.join(random_fractions(seed, 2 * where, A, B), random_fractions(seed, 2 * where + 1, A, B))
        return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [A, B, 32])


@triton.jit
def _store(
    codes_ptr, scales_ptr, codes, byte, batch, row, group, rows, groups, row_span, group_span,
    BLOCK: tl.constexpr, SWIZZLED: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    if BLOCK == 32:
        # The two halves of a block one after the other along K.
        low, high = tl.split(tl.reshape(codes, [codes.shape[0], codes.shape[1], 2, 2]))
        first, second = tl.split((low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32))
        codes = tl.join(tl.trans(first), tl.trans(second)) if ACROSS else tl.join(first, second)
        codes = tl.reshape(codes, [ROWS, 2 * GROUPS])
    elif ACROSS:
        codes = tl.trans(codes)
    EIGHTS: tl.constexpr = BLOCK // 16  # int64 a block
    row = row + tl.arange(0, ROWS)
    out_row = (batch * rows + row).to(tl.int64)
    eighth = group * EIGHTS + tl.arange(0, GROUPS * EIGHTS)
    where = codes_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + out_row[:, None] * (groups * EIGHTS) + eighth[None, :]
    tl.store(where, codes, mask=(row < rows)[:, None] & (eighth < groups * EIGHTS)[None, :])

    byte = tl.trans(byte) if ACROSS else byte
    group = group + tl.arange(0, GROUPS)
    present = (row < rows)[:, None] & (group < groups)[None, :]
    if SWIZZLED:
        column_blocks = group_span // 4
        where = scales_ptr + tl.cast(batch, tl.int64) * row_span * group_span + swizzled_offset(row[:, None], group[None, :], column_blocks)
        byte = tl.where(present, byte, 0)
        present = (row < row_span)[:, None] & (group < group_span)[None, :]
    else:
        where = scales_ptr + out_row[:, None] * groups + group[None, :]
    tl.store(where, byte.to(tl.uint8), mask=present)

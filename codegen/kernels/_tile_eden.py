"""MS-EDEN on tiles: the device twin of `reference/eden.py`. A lane holds the 128 values of a group, eight blocks of 16.

Registers are what these tiles are short of, so a group is encoded block by block: only codes and sums are left of one when the next comes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_block import lane_max, lane_sum, scale_fractions
from fp4compile.codegen.kernels._tile_e2m1 import nearest_values, words_of_values
from fp4compile.codegen.kernels._tile_minifloat import bits_float, float_bits
from fp4compile.codegen.kernels._tile_scale import cap, reciprocal, round_e4m3


@triton.jit
def eden_groups(
    x, encode, decode, seed_ptr, batch, row, unit, rows, groups,
    CAPABILITY: tl.constexpr, ACROSS: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Codes, int64 [A, B, 8], and e4m3 bytes, int32 [A, B, 8], of `x` [A, B, 128], whose first row and unit are `row` and `unit`."""
    largest = tl.reshape(lane_max(tl.reshape(tl.abs(x), [A, B * 8, 16]), A, B * 8, 16), [A, B, 8])
    encode, decode = encode[:, :, None], decode[:, :, None]
    _, scale = round_e4m3(largest * (encode * 0.16468749940395355), CAPABILITY)  # reference.eden.EDEN_SIXTH
    multiplier = cap(reciprocal(scale * decode, CAPABILITY))
    words, length, projection = _encode(x, multiplier, scale, tl.broadcast_to(encode, [A, B, 8]), A, B, 8, CAPABILITY)
    usable = projection > 0.0
    ratio = tl.div_rn(length, tl.where(usable, projection, 1.0))
    correction = tl.where(usable & (ratio < float("inf")), ratio, 1.0)
    numbers = _block_numbers(batch, row, unit, rows, groups, ACROSS, A, B)
    byte = _stochastic_e4m3(tl.minimum(scale * correction[:, :, None], 448.0), scale_fractions(tl.load(seed_ptr), numbers))
    low, high = tl.split(tl.reshape(words, [A, B, 8, 2]))
    not_a_number = largest != largest
    low, high = tl.where(not_a_number, 0x77777777, low), tl.where(not_a_number, 0x77777777, high)
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32), tl.where(largest < float("inf"), byte, 0x7F)


@triton.jit
def _encode(x, multiplier, scale, encode, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr, CAPABILITY: tl.constexpr):
    """int32 [A, B, 2 N], eight codes a word, of N blocks; and their sums of (x S)^2 and of x S times what it became, [A, B]."""
    if N == 1:
        magnitude = tl.abs(x)
        value = nearest_values(tl.minimum(magnitude * multiplier, 6.0))
        words = words_of_values(value * 1.1754943508222875e-38, x, CAPABILITY, A, B, 16)  # 2^-126
        scaled = magnitude * encode
        return words, lane_sum(scaled * scaled, A, B, 16), lane_sum(scaled * (value * scale), A, B, 16)
    else:
        x, x_2 = _halves(x, A, B, 16 * N)
        multiplier, multiplier_2 = _halves(multiplier, A, B, N)
        scale, scale_2 = _halves(scale, A, B, N)
        encode, encode_2 = _halves(encode, A, B, N)
        words, length, projection = _encode(x, multiplier, scale, encode, A, B, N // 2, CAPABILITY)
        words_2, length_2, projection_2 = _encode(x_2, multiplier_2, scale_2, encode_2, A, B, N // 2, CAPABILITY)
        words = tl.reshape(tl.permute(tl.join(words, words_2), (0, 1, 3, 2)), [A, B, 2 * N])
        return words, length + length_2, projection + projection_2


@triton.jit
def _halves(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """The first and the second half of `x` [A, B, N]."""
    return tl.split(tl.permute(tl.reshape(x, [A, B, 2, N // 2]), (0, 1, 3, 2)))


@triton.jit
def _block_numbers(batch, row, unit, rows, groups, ACROSS: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Places of the tile's blocks, [A, B, 8], in the padded tensor."""
    if ACROSS:
        row = (row + tl.arange(0, B))[None, :, None]
        unit = (unit + tl.arange(0, A))[:, None, None]
    else:
        row = (row + tl.arange(0, A))[:, None, None]
        unit = (unit + tl.arange(0, B))[None, :, None]
    return (batch * rows + row) * groups + unit * 8 + tl.arange(0, 8)[None, None, :]


@triton.jit
def _stochastic_e4m3(target, fraction):
    """Bytes (int32) of the neighbour below float32 `target` in 0 .. 448 after `fraction` of a step was added to it."""
    power_of_two = bits_float(float_bits(target) & 0x7F800000)
    step = tl.maximum(power_of_two * 0.125, 0.001953125)
    raised = tl.fma(fraction, step, target)  # the product is exact: this is one rounding, as in the reference
    return tl.where(raised < 0.015625, (raised * 512.0).to(tl.int32), (float_bits(raised) >> 20) - 960)

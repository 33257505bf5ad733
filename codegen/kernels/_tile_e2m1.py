"""e2m1 elements on tiles: the device twins of `reference/e2m1.py`. A code is a magnitude 0..7 with the sign in bit 3.

From 0 on, codes rise by one every 0.5, from 2 on every 1, from 4 on every 2: they are the lowest of three lines, 2 m, m + 2 and m/2 + 4. So
rounding a magnitude to a code is rounding each line to an integer, which one addition to 1.5 * 2^23 does, and taking the least, ties to
even included: RN(2 m) and its like are never rounded twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_minifloat import bits_float, float_bits

_ORIGIN = tl.constexpr(0x4B400000)  # bits of 1.5 * 2^23, whose units are integers


@triton.jit
def nearest_codes(magnitude, CAPABILITY: tl.constexpr):
    """Codes 0..7 (int32) of float32 `magnitude` >= 0, ties to even, saturating at 6; of NaN anything. The FMAs' products are exact."""
    by_half = float_bits(tl.fma(magnitude, 2.0, 12582912.0))
    by_one = float_bits(magnitude + 12582914.0)
    if CAPABILITY > 0:
        # Saturating on the way spares the minimum with 7, and integer units are what these kernels are short of.
        by_two = float_bits(_above_four(magnitude) + 12582918.0)
        return tl.minimum(tl.minimum(by_half, by_one), by_two) - _ORIGIN
    else:
        by_two = float_bits(tl.fma(magnitude, 0.5, 12582916.0))
        return tl.minimum(tl.minimum(tl.minimum(by_half, by_one), by_two), _ORIGIN + 7) - _ORIGIN


@triton.jit
def _above_four(magnitude):
    """m/2 - 2, clamped to 0 .. 1. From 4 to 6 it is exact."""
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, 0f3F000000, 0fC0000000;", "=f,f", [magnitude], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def stochastic_codes(magnitude, random, CAPABILITY: tl.constexpr):
    """Codes 0..7 of float32 `magnitude` >= 0, which `random` (float32, a byte times 2^-9) moves up to its upper neighbour; NaN becomes 7.

    `cvt.rs.satfinite.e2m1x4.f32` of sm_100a and sm_103a is no match: it takes its random bits in another order and by another sum.
    """
    magnitude = tl.minimum(magnitude, 6.0)  # from 6 on every sum below is one of code 7
    exponent = bits_float(float_bits(magnitude) & 0x7F800000)
    twice_step = tl.maximum(exponent, 1.0)
    raised = tl.fma(random, twice_step, magnitude)  # the product is exact: this is one rounding, as in the reference
    return _floor_codes(raised, CAPABILITY)


@triton.jit
def _floor_codes(magnitude, CAPABILITY: tl.constexpr):
    """Codes of the e2m1 values just below `magnitude` < 8; the lines of `nearest_codes`, rounded towards zero."""
    if CAPABILITY > 0:
        by_half = float_bits(_fma_rz(magnitude, 2.0, 12582912.0))
        by_one = float_bits(_fma_rz(magnitude, 1.0, 12582914.0))
        by_two = float_bits(_fma_rz(magnitude, 0.5, 12582916.0))
        return tl.minimum(tl.minimum(by_half, by_one), by_two) - _ORIGIN
    else:
        # From 1 on a code is the exponent with one mantissa bit: 1.0 is 254 >> 22 and has code 2. Below 1 there is only 0.5.
        return tl.maximum((float_bits(magnitude) >> 22) - 252, tl.where(magnitude >= 0.5, 1, 0))


@triton.jit
def _fma_rz(a, B: tl.constexpr, C: tl.constexpr):
    return tl.inline_asm_elementwise(
        "fma.rz.f32 $0, $1, $2, $3;",
        "=f,f,f,f",
        [a, tl.full(a.shape, B, tl.float32), tl.full(a.shape, C, tl.float32)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def nearest_values(magnitude):
    """e2m1 values (float32) of float32 `magnitude` in 0 .. 7, 7 excluded, ties to even; of others anything.

    Adding a number of the magnitude's own exponent, 22 binades up, rounds to one mantissa bit. Up to 2, of which the least exponent is that
    of 1, the sum below lies in the binade of 2^22; for exponents 1 and 2 in those above.
    """
    exponent = bits_float(float_bits(magnitude) & 0x7F800000)
    anchor = tl.fma(exponent, 3145728.0, 4194304.0)  # (3/4 2^e + 1) 2^22
    return (magnitude + anchor) - anchor


@triton.jit
def words_of_codes(code, signs_of, CAPABILITY: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """int32 [A, B, N / 8]: eight codes a word, the first lowest, of `code` [A, B, N] with the signs of float32 `signs_of`."""
    return _pack_magnitudes(code, 4, A, B, N) | _pack_signs(float_bits(signs_of), CAPABILITY, A, B, N)


@triton.jit
def words_of_values(value, signs_of, CAPABILITY: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """The same of e2m1 magnitudes `value` times 2^-126: there 0.5 is subnormal, and exponent and mantissa from bit 22 on are the code."""
    even, odd = tl.split(tl.reshape(float_bits(value), [A, B, N // 2, 2]))
    pairs = (even + (odd << 4)) >> 22
    return _pack_magnitudes(pairs, 8, A, B, N // 2) | _pack_signs(float_bits(signs_of), CAPABILITY, A, B, N)


@triton.jit
def _pack_magnitudes(code, SHIFT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    # Additions, not ORs: they become multiply-adds, and the constants that a code carries leave the loop.
    if SHIFT == 32:
        return code
    else:
        even, odd = tl.split(tl.reshape(code, [A, B, N // 2, 2]))
        return _pack_magnitudes(even + (odd << SHIFT), 2 * SHIFT, A, B, N // 2)


@triton.jit
def _pack_signs(bits, CAPABILITY: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """int32 [A, B, N / 8] with the sign of each eighth of float32 `bits` [A, B, N] on top of its nibble."""
    b0, b1, b2, b3, b4, b5, b6, b7 = _eighths(bits, A, B, N)
    if CAPABILITY > 0:
        even, odd = _top_bytes(b0, b2, b4, b6), _top_bytes(b1, b3, b5, b7)
    else:
        even = ((b0 >> 24) & 0xFF) | ((b2 >> 16) & 0xFF00) | ((b4 >> 8) & 0xFF0000) | (b6 & -0x1000000)
        odd = ((b1 >> 24) & 0xFF) | ((b3 >> 16) & 0xFF00) | ((b5 >> 8) & 0xFF0000) | (b7 & -0x1000000)
    return (odd & -0x7F7F7F80) | ((even >> 4) & 0x08080808)


@triton.jit
def _top_bytes(b0, b1, b2, b3):
    """The top bytes of four words, the first lowest. What the shifts spell that this replaces takes three times as many instructions."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u, v; prmt.b32 u, $1, $2, 0x0073; prmt.b32 v, $3, $4, 0x0073; prmt.b32 $0, u, v, 0x5410; }",
        "=r,r,r,r,r",
        [b0, b1, b2, b3],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _eighths(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Elements 0 to 7 of each eight of `x` [A, B, N], as eight tensors [A, B, N / 8]."""
    even, odd = tl.split(tl.reshape(x, [A, B, N // 8, 2, 2, 2]))
    even_low, even_high = tl.split(even)  # 0 4, 2 6
    odd_low, odd_high = tl.split(odd)  # 1 5, 3 7
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def words_by_hardware(y, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """`words_of_codes(nearest_codes(|y|), y)` in four instructions a word, from sm_100 on."""
    y0, y1, y2, y3, y4, y5, y6, y7 = _eighths(y, A, B, N)
    return tl.inline_asm_elementwise(
        "{ .reg .b8 b0, b1, b2, b3;"
        " cvt.rn.satfinite.e2m1x2.f32 b0, $2, $1; cvt.rn.satfinite.e2m1x2.f32 b1, $4, $3;"
        " cvt.rn.satfinite.e2m1x2.f32 b2, $6, $5; cvt.rn.satfinite.e2m1x2.f32 b3, $8, $7;"
        " mov.b32 $0, {b0, b1, b2, b3}; }",
        "=r,f,f,f,f,f,f,f,f",
        [y0, y1, y2, y3, y4, y5, y6, y7],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode(code):
    """float32 values of int32 codes. The three magnitude bits at the exponent boundary are the value times 2^-126, 0.5 included."""
    return bits_float(((code & 7) << 22) | ((code & 8) << 28)) * 8.507059173023462e37  # 2^126


@triton.jit
def unpack(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS/2] bytes to [ROWS, COLS] int32 codes."""
    both = packed.to(tl.int32)
    return tl.reshape(tl.join(both & 0xF, both >> 4), [ROWS, COLS])

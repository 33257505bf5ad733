"""e2m1 elements on tiles: the device twins of `reference/e2m1.py`. Codes are int32, one an element, bit 3 the sign."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_minifloat import bits_float, float_bits, magnitude_bits, round_minifloat


@triton.jit
def encode_nearest(y):
    """Codes of float32 `y`, ties to even, saturating at 6; NaN becomes +6."""
    magnitude = magnitude_bits(y)
    code = tl.minimum(round_minifloat(magnitude, 0x3F800000, 0x40800000, 1), 7)
    return _with_sign(code, y, magnitude)


@triton.jit
def encode_stochastic(y, random_byte):
    """Codes of float32 `y`, where `random_byte` (int32, 0..255) moves each magnitude up to its upper neighbour."""
    bits = magnitude_bits(y)
    magnitude = bits_float(bits)
    step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
    raised = magnitude + random_byte.to(tl.float32) * (1.0 / 256.0) * step
    # From 1 on a code is the exponent with one mantissa bit: 1.0 is 254 >> 22 and has code 2. Below 1 there is only 0.5.
    floor = tl.maximum((float_bits(raised) >> 22) - 252, tl.where(raised >= 0.5, 1, 0))
    return _with_sign(tl.minimum(floor, 7), y, bits)


@triton.jit
def _with_sign(code, y, magnitude):
    sign = (float_bits(y) >> 28) & 8
    return tl.where(magnitude > 0x7F800000, 7, code | sign)


@triton.jit
def decode(code):
    """float32 values of int32 codes. The three magnitude bits at the exponent boundary are the value times 2^-126, 0.5 included."""
    return bits_float(((code & 7) << 22) | ((code & 8) << 28)) * 8.507059173023462e37  # 2^126


@triton.jit
def pack(codes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] codes to [ROWS, COLS/2] bytes, the even index in the low nibble."""
    low, high = tl.split(tl.reshape(codes, [ROWS, COLS // 2, 2]))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def unpack(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS/2] bytes to [ROWS, COLS] int32 codes."""
    both = packed.to(tl.int32)
    return tl.reshape(tl.join(both & 0xF, both >> 4), [ROWS, COLS])

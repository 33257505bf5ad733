"""Rounding float32 magnitudes to a small float format with integer arithmetic and one addition.

No conversion instruction is used: sm_80 has none for e4m3, none below sm_100 has one for e2m1, and their treatment of values out of
range differs. Adding 2^(e + 23 - m) to a magnitude of exponent e makes the adder itself round to m mantissa bits, ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def float_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, ordered as integers like the magnitudes: every NaN lies above the infinity, 0x7F800000."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def round_minifloat(magnitude, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, MANTISSA: tl.constexpr):
    """Codes (int32, without sign) of float32 `magnitude` bits, nearest, ties to the even code.

    LOWEST and HIGHEST are the exponent fields of the smallest normal and of the largest value; magnitudes past the largest value give
    a code past its code, so the caller takes the minimum.
    """
    exponent = tl.minimum(tl.maximum(magnitude & 0x7F800000, LOWEST), HIGHEST)
    anchor = exponent + ((23 - MANTISSA) << 23)
    steps = float_bits(bits_float(magnitude) + bits_float(anchor)) - anchor
    return steps + ((exponent - LOWEST) >> (23 - MANTISSA))

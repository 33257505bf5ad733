"""Block and global scales on tiles: the device twins of the scale arithmetic in `reference/block.py`.

Every operation is one float32 rounding in the order that `reference/block.py` fixes; kernels that call this are compiled without
contraction to FMA.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_minifloat import bits_float, float_bits, round_minifloat


@triton.jit
def encode_scale(amax, BOUND: tl.constexpr):
    """S = min(BOUND / amax, largest float32), or 1 where `amax` is 0."""
    quotient = tl.div_rn(tl.full(amax.shape, BOUND, tl.float32), tl.where(amax == 0.0, 1.0, amax))
    return tl.where(amax == 0.0, 1.0, cap(quotient))


@triton.jit
def reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def cap(x):
    """Infinity becomes the largest float32; NaN stays, which `tl.minimum` would lose."""
    return tl.where(x > 3.4028234663852886e38, 3.4028234663852886e38, x)


@triton.jit
def encode_e4m3(target):
    """Bytes (int32) of float32 `target` >= 0, nearest, ties to even, saturating at 448. NaN gives 0x7F."""
    clamped = tl.where(target > 448.0, 448.0, target)
    byte = round_minifloat(float_bits(clamped), 0x3C800000, 0x43800000, 3)
    return tl.where(target != target, 0x7F, byte)


@triton.jit
def decode_e4m3(byte):
    """float32 values of e4m3fn bytes (any integer dtype)."""
    wide = byte.to(tl.int32)
    magnitude = wide & 0x7F
    value = bits_float((magnitude << 20) | ((wide & 0x80) << 24)) * 1.329227995784916e36  # 2^120
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def decode_e8m0(byte):
    """float32 values 2^(byte - 127); byte 0 is subnormal in float32 and 255 is NaN."""
    wide = byte.to(tl.int32)
    value = bits_float(tl.where(wide == 0, 0x00400000, wide << 23))
    return tl.where(wide == 255, float("nan"), value)

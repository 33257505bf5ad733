"""Blocks of two kinds on tiles, e2m1 or integers by the sign bit of their scale byte: the device twin of `reference/block_kinds.py`.

MixFP4's integers times a scale have 7 significant bits and are exact in bfloat16. IF4's elements are 7 times e2m1's and 6 times integers, 9
bits with a scale: exact in float16 and TF32 only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_e2m1 import decode
from fp4compile.codegen.kernels._tile_minifloat import bits_float, float_bits


@triton.jit
def decode_integer(code):
    """float32 values of int32 codes: magnitude 0..7, the sign in bit 3."""
    return bits_float(float_bits((code & 7).to(tl.float32)) | ((code & 8) << 28))


@triton.jit
def decode_by_flag(codes, byte, FORMAT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [ROWS, GROUPS, BLOCK] of int32 `codes` [ROWS, GROUPS * BLOCK], of the kinds that `byte` [ROWS, GROUPS] names."""
    floats, integers = decode(codes), decode_integer(codes)
    if FORMAT == "if4":
        floats, integers = floats * 7.0, integers * 6.0
    shape: tl.constexpr = [ROWS, GROUPS, BLOCK]
    return tl.where((byte.to(tl.int32) >= 0x80)[:, :, None], tl.reshape(integers, shape), tl.reshape(floats, shape))

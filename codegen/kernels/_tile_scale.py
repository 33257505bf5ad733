"""Block and global scales on tiles: the device twins of the scale arithmetic in `reference/block_scales.py`.

Every operation is one float32 rounding in the order that the reference fixes; kernels that call this are compiled without contraction
to FMA. CAPABILITY is 10 * major + minor of the GPU, or 0 for plain Triton, which the interpreter runs.
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
def encode_of(amax_ptr, static_amax, batch, parts, FORMAT: tl.constexpr, BOUND: tl.constexpr, MOST_PARTS: tl.constexpr):
    """S of matrix `batch`, [1, 1], of `amax_ptr` (batch, parts), or of `static_amax` where that is None; 1 for MXFP4."""
    if FORMAT != "nvfp4":
        return tl.full([1, 1], 1.0, tl.float32)
    elif amax_ptr is None:
        return encode_scale(tl.full([1, 1], 0.0, tl.float32) + static_amax, BOUND)
    else:
        part = tl.arange(0, MOST_PARTS)
        each = tl.load(amax_ptr + batch * parts + part, mask=part < parts, other=0.0)
        return encode_scale(tl.full([1, 1], 0.0, tl.float32) + tl.max(each, axis=0), BOUND)


@triton.jit
def store_decode(decode_ptr, decode, batch, first):
    """Store `decode` [1, 1] of matrix `batch`, from the program whose `first` is 0."""
    first = tl.zeros([1, 1], tl.int32) + first
    tl.store(decode_ptr + batch + 0 * first, decode, mask=first == 0)


@triton.jit
def reciprocal(x, CAPABILITY: tl.constexpr):
    """1 / x, correctly rounded."""
    if CAPABILITY > 0:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def cap(x):
    """Infinity becomes the largest float32; NaN stays, which `tl.minimum` would lose."""
    return tl.where(x > 3.4028234663852886e38, 3.4028234663852886e38, x)


@triton.jit
def round_e4m3(target, CAPABILITY: tl.constexpr):
    """Bytes (int32) and values (float32) of `target` >= 0 in e4m3, nearest, ties to even, saturating at 448; NaN gives 0x7F and NaN."""
    if CAPABILITY >= 89:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 h, l, u; .reg .b32 v;"
            " cvt.rn.satfinite.e4m3x2.f32 h, 0f00000000, $2; cvt.u32.u16 $0, h;"
            " cvt.rn.f16x2.e4m3x2 v, h; mov.b32 {l, u}, v; cvt.f32.f16 $1, l; }",
            "=r,=f,f",
            [target],
            dtype=(tl.int32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        clamped = tl.where(target > 448.0, 448.0, target)
        nearest = round_minifloat(float_bits(clamped), 0x3C800000, 0x43800000, 3)
        byte = tl.where(target != target, 0x7F, nearest)
        return byte, decode_e4m3(byte)


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


@triton.jit
def swizzled_offset(row, group, column_blocks):
    """Where the scale of (row, group) lies in its matrix's 128x4 blocked layout, `column_blocks` blocks wide: `reference/swizzle.py`."""
    block = (row // 128).to(tl.int64) * column_blocks + group // 4
    return block * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + group % 4

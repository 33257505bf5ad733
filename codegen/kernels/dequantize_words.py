"""NVFP4 codes to bfloat16 or float16, 16 codes a lane from two words: what is done once to the operands of a large product.

It moves 2.56 bytes a value and should cost no more than that, so codes are decoded as the products decode them, two at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_decode import (
    decode_pair,
    decode_scales,
    high_halves,
    low_halves,
    multiply_pairs,
    nan_flags,
    tiled_pair,
)  # fmt: skip


@triton.jit
def dequantize_plain_kernel(
    codes_ptr, scales_ptr, out_ptr, rows, blocks, codes_stride, scales_stride,
    FP16: tl.constexpr, PTX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (`rows`, 8 `blocks`) int32, contiguous: pairs of halves of plain codes (`rows`, `blocks`) int64 and scales (`rows`, `blocks`)."""
    columns = tl.cdiv(blocks, BLOCK_C)
    row = (tl.program_id(0) // columns * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    block = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    present = (row < rows) & (block < blocks)
    words = tl.load(codes_ptr + row * codes_stride + block, mask=present, other=0)
    scale = tl.load(scales_ptr + row * scales_stride + block, mask=present, other=0).to(tl.int32)
    first, second = words.to(tl.int32), (words >> 32).to(tl.int32)
    a0, a1, a2, a3 = _neighbours(first, FP16)
    b0, b1, b2, b3 = _neighbours(second, FP16)
    values = _scaled(a0, a1, a2, a3, b0, b1, b2, b3, scale, FP16, PTX)
    at = (row * blocks + block)[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(out_ptr + at, values, mask=present[:, :, None])


@triton.jit
def dequantize_tiled_kernel(
    codes_ptr, scales_ptr, out_ptr, rows, chunks, blocks, FP16: tl.constexpr, PTX: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out (`rows`, 8 `blocks`) int32, contiguous, of tiled codes (T, C, 128) int64 and scales (T, C, 128)."""
    columns = tl.cdiv(chunks, BLOCK_C)
    tile = (tl.program_id(0) // columns).to(tl.int64)
    row = tl.arange(0, 16)[:, None]
    block = tl.program_id(0) % columns * (8 * BLOCK_C) + tl.arange(0, 8 * BLOCK_C)[None, :]
    inside = (block < 8 * chunks) & (row >= 0)
    chunk = tile * chunks + block // 8
    words = tl.load(codes_ptr + chunk * 128 + row * 8 + block % 8, mask=inside, other=0)
    scale_at = row % 8 * 16 + row // 8 * 2 + block % 8 // 2 * 4 + block % 2
    scale = tl.load(scales_ptr + chunk * 128 + scale_at, mask=inside, other=0).to(tl.int32)
    first, second = words.to(tl.int32), (words >> 32).to(tl.int32)
    values = _scaled(
        tiled_pair(first, second, 0, FP16), tiled_pair(first, second, 1, FP16), tiled_pair(first, second, 2, FP16),
        tiled_pair(first, second, 3, FP16), tiled_pair(first, second, 4, FP16), tiled_pair(first, second, 5, FP16),
        tiled_pair(first, second, 6, FP16), tiled_pair(first, second, 7, FP16), scale, FP16, PTX,
    )  # fmt: skip
    present = (tile * 16 + row < rows) & (block < blocks)
    at = ((tile * 16 + row) * blocks + block)[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(out_ptr + at, values, mask=present[:, :, None])


@triton.jit
def _neighbours(word, FP16: tl.constexpr):
    """The four pairs of neighbours of a plain word, scaled as by `decode_pair`."""
    n0, n1 = decode_pair(word, 0, FP16), decode_pair(word, 1, FP16)
    n2, n3 = decode_pair(word, 2, FP16), decode_pair(word, 3, FP16)
    return low_halves(n0, n1), low_halves(n2, n3), high_halves(n0, n1), high_halves(n2, n3)


@triton.jit
def _scaled(p0, p1, p2, p3, p4, p5, p6, p7, scale, FP16: tl.constexpr, PTX: tl.constexpr):
    """[..., 8]: the pairs times their `scale` and what decoding left out; NaN stays NaN."""
    pair, _ = decode_scales(scale, FP16, PTX)
    pair = tl.where((nan_flags(scale) & 0x80) != 0, 0x7FFF7FFF, pair)
    p0, p1, p2, p3 = _times(p0, pair, FP16, PTX), _times(p1, pair, FP16, PTX), _times(p2, pair, FP16, PTX), _times(p3, pair, FP16, PTX)
    p4, p5, p6, p7 = _times(p4, pair, FP16, PTX), _times(p5, pair, FP16, PTX), _times(p6, pair, FP16, PTX), _times(p7, pair, FP16, PTX)
    every = tl.join(tl.join(tl.join(p0, p4), tl.join(p2, p6)), tl.join(tl.join(p1, p5), tl.join(p3, p7)))
    return tl.reshape(every, [p0.shape[0], p0.shape[1], 8])


@triton.jit
def _times(pair, scale, FP16: tl.constexpr, PTX: tl.constexpr):
    return multiply_pairs(multiply_pairs(pair, scale, FP16, PTX), 0x58005800 if FP16 else 0x43804380, FP16, PTX)  # 2^7, 2^8

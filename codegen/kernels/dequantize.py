"""Codes to the halves they stand for, and plain weights to tiled ones: what is done once to an operand before a product reads it.

An e2m1 element times its block scale is exact in bfloat16, and for NVFP4 in float16, so nothing is lost; global scales are left to the
epilogue of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_e2m1 import decode, unpack
from fp4compile.codegen.kernels._tile_scale import decode_e4m3, decode_e8m0


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, out_ptr, rows, k, codes_stride_b, codes_stride_r, codes_stride_k,
    scales_stride_b, scales_stride_r, scales_stride_k, width, NVFP4: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (batch, `rows`, `width`) contiguous: values of codes (batch, `rows`, Kp/2); zero from column `k` on. Scales are bytes."""
    BLOCK: tl.constexpr = 16 if NVFP4 else 32
    columns = tl.cdiv(width, BLOCK_K)
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // columns * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    start = tl.program_id(0) % columns * BLOCK_K
    pair = start // 2 + tl.arange(0, BLOCK_K // 2)
    group = start // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
    present = (row < rows)[:, None]
    codes_at = batch * codes_stride_b + row[:, None] * codes_stride_r + pair[None, :].to(tl.int64) * codes_stride_k
    scales_at = batch * scales_stride_b + row[:, None] * scales_stride_r + group[None, :].to(tl.int64) * scales_stride_k
    packed = tl.load(codes_ptr + codes_at, mask=present & (2 * pair < k)[None, :], other=0)
    byte = tl.load(scales_ptr + scales_at, mask=present & (BLOCK * group < k)[None, :], other=0)
    scale = decode_e4m3(byte) if NVFP4 else decode_e8m0(byte)
    values = tl.reshape(decode(unpack(packed, BLOCK_R, BLOCK_K)), [BLOCK_R, BLOCK_K // BLOCK, BLOCK]) * scale[:, :, None]
    column = start + tl.arange(0, BLOCK_K)
    # Codes between k and the next whole block are no zeros where the operand was rotated.
    values = tl.where((column < k)[None, :], tl.reshape(values, [BLOCK_R, BLOCK_K]), 0.0)
    at = (batch * rows + row[:, None]) * width + column[None, :]
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=present & (column < width)[None, :])


@triton.jit
def tile_weight_kernel(
    codes_ptr, scales_ptr, tiled_codes_ptr, tiled_scales_ptr, rows, half_k, blocks, chunks,
    codes_stride_b, codes_stride_r, codes_stride_k, scales_stride_b, scales_stride_r, scales_stride_k, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tiled codes (batch, T, `chunks`, 1024) and scales (batch, T, `chunks`, 128) of plain NVFP4 ones, zero-padded; all are bytes."""
    columns = tl.cdiv(chunks, BLOCK_C)
    batch = tl.program_id(1).to(tl.int64)
    tile = (tl.program_id(0) // columns).to(tl.int64)
    first = tl.program_id(0) % columns * BLOCK_C
    row = tl.arange(0, 16)[:, None]
    present = tile * 16 + row < rows
    tile_out = (batch * tl.cdiv(rows, 16) + tile) * chunks

    block = first * 8 + tl.arange(0, BLOCK_C * 8)[None, :]
    at = codes_ptr + batch * codes_stride_b + (tile * 16 + row) * codes_stride_r + 8 * block.to(tl.int64) * codes_stride_k
    word_0 = _load_word(at, codes_stride_k, present, half_k - 8 * block)
    word_1 = _load_word(at + 4 * codes_stride_k, codes_stride_k, present, half_k - 8 * block - 4)
    word_0, word_1 = _permute_words(word_0, word_1)
    to = tiled_codes_ptr.to(tl.pointer_type(tl.int32)) + tile_out * 256 + block // 8 * 256 + row * 16 + block % 8 * 2
    inside = (row >= 0) & (block < chunks * 8)
    tl.store(to, word_0, mask=inside)
    tl.store(to + 1, word_1, mask=inside)

    group = first * 8 + tl.arange(0, BLOCK_C * 8)[None, :]
    at = batch * scales_stride_b + (tile * 16 + row) * scales_stride_r + group.to(tl.int64) * scales_stride_k
    scales = tl.load(scales_ptr + at, mask=present & (group < blocks), other=0)
    to = tile_out * 128 + group // 8 * 128 + row % 8 * 16 + row // 8 * 2 + group % 8 // 2 * 4 + group % 2
    tl.store(tiled_scales_ptr + to, scales, mask=(row >= 0) & (group < chunks * 8))


@triton.jit
def _load_word(at, stride, present, left):
    """Four bytes, `stride` apart, as a little-endian word; zero from byte `left` on."""
    word = tl.zeros(at.shape, tl.int32)
    for i in tl.static_range(4):
        word |= tl.load(at + i * stride, mask=present & (i < left), other=0).to(tl.int32) << (8 * i)
    return word


@triton.jit
def _permute_words(word_0, word_1):
    """See `reference/tiled_words.py`."""
    first, second = tl.zeros_like(word_0), tl.zeros_like(word_0)
    for pair in tl.static_range(8):
        both = (word_0 if pair < 4 else word_1) >> (8 * (pair % 4))
        spread = ((both & 0x7) << 6) | ((both & 0x8) << 12) | ((both & 0x70) << 18) | ((both & 0x80) << 24)
        if pair > 0:
            low = (spread.to(tl.uint32, bitcast=True) >> (2 * pair)).to(tl.int32, bitcast=True)
            spread = low | (spread << (32 - 2 * pair))
        if pair == 0 or pair == 2 or pair == 5:
            first |= spread
        elif pair == 1 or pair == 3 or pair == 6:
            second |= spread
        else:
            first |= spread & 0x06030603
            second |= spread & ~0x06030603
    return first, second

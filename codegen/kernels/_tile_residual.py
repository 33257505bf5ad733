"""Blocks in a given order, what quantizing loses of them, and where both lie: the device twin of `reference/residual.py`.

Tiles are [A, B, UNIT], rows by blocks, a block a lane. Blocks up to `plain` have one place in a row of the result, those behind it two:
block j lies at j + max(j - plain, 0), and its residual behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_e2m1 import decode as decode_e2m1
from fp4compile.codegen.kernels._tile_load import QUADS, load_each, load_unit_quads
from fp4compile.codegen.kernels._tile_quantize import _mxfp4_blocks, _nvfp4_blocks, _two_words
from fp4compile.codegen.kernels._tile_scale import decode_e4m3, decode_e8m0, swizzled_offset


@triton.jit
def load_in_order(
    x_ptr, order_ptr, row, block, rows, k, blocks, stride_r, stride_k,
    BY_BLOCK: tl.constexpr, ACCESS: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """float32 [A, B, UNIT] of the rows from `row` on and the blocks from `block` on; zero outside.

    `order_ptr` numbers whole blocks of x where BY_BLOCK, else channels, read one by one.
    """
    row = (row + tl.arange(0, A))[:, None]
    block = (block + tl.arange(0, B))[None, :]
    inside = (row < rows) & (block < blocks)
    if BY_BLOCK:
        source = tl.load(order_ptr + block, mask=block < blocks, other=0)
        if ACCESS == QUADS:
            return load_unit_quads(x_ptr, row, source, inside, stride_r, UNIT, A, B)
        else:
            return load_each(x_ptr + row.to(tl.int64) * stride_r, source * UNIT, inside, k, stride_k, UNIT, A, B)
    else:
        # QUADS counts rows in 16 bytes.
        ELEMENTS_A_STEP: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth if ACCESS == QUADS else 1
        address = x_ptr + row.to(tl.int64) * stride_r * ELEMENTS_A_STEP
        return _gather(address, order_ptr + block * UNIT, inside, block < blocks, k, stride_k, UNIT, A, B)


@triton.jit
def _gather(address, order, inside, known, k, stride_k, COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """float32 [A, B, COUNT] of the channels that `order` [1, B] and what follows it name."""
    if COUNT == 2:
        first = tl.load(order, mask=known, other=0)
        second = tl.load(order + 1, mask=known, other=0)
        low = tl.load(address + first.to(tl.int64) * stride_k, mask=inside & (first < k), other=0.0)
        high = tl.load(address + second.to(tl.int64) * stride_k, mask=inside & (second < k), other=0.0)
        return tl.join(low.to(tl.float32), high.to(tl.float32))
    else:
        low = _gather(address, order, inside, known, k, stride_k, COUNT // 2, A, B)
        high = _gather(address, order + COUNT // 2, inside, known, k, stride_k, COUNT // 2, A, B)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [A, B, COUNT])


@triton.jit
def quantize_with_residuals(
    x, encode, decode, codes_ptr, scales_ptr, batch, row, block, rows, plain, blocks, row_span, group_span,
    FORMAT: tl.constexpr, SCALE_RULE: tl.constexpr, SWIZZLED: tl.constexpr, CAPABILITY: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Quantize and store `x` [A, B, UNIT], whose first row and block are `row` and `block`, and the residuals of blocks from `plain` on."""
    each = (block + tl.arange(0, B))[None, :]
    row = (row + tl.arange(0, A))[:, None]
    group = each + tl.minimum(tl.maximum(each - plain, 0), blocks - plain)
    groups = 2 * blocks - plain
    codes, byte = _quantized(x, encode, decode, FORMAT, SCALE_RULE, CAPABILITY, A, B)
    _store(codes_ptr, scales_ptr, codes, byte, batch, row, group, each >= 0, rows, groups, row_span, group_span, FORMAT, SWIZZLED)
    if block + B > plain:
        lost = x - _decoded(codes, byte, decode, FORMAT, A, B)
        codes, byte = _quantized(lost, encode, decode, FORMAT, SCALE_RULE, CAPABILITY, A, B)
        outlier = (each >= plain) & (each < blocks)
        _store(codes_ptr, scales_ptr, codes, byte, batch, row, group + 1, outlier, rows, groups, row_span, group_span, FORMAT, SWIZZLED)


@triton.jit
def _quantized(
    x, encode, decode, FORMAT: tl.constexpr, SCALE_RULE: tl.constexpr, CAPABILITY: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Codes, int64 [A, B] for NVFP4 and int32 [A, B, 4] for MXFP4, and scale bytes, int32 [A, B]."""
    if FORMAT == "nvfp4":
        return _nvfp4_blocks(x, encode, decode, 0.0, SCALE_RULE, 0, False, CAPABILITY, A, B)
    else:
        return _mxfp4_blocks(x, 0.0, False, CAPABILITY, A, B)


@triton.jit
def _decoded(codes, byte, decode, FORMAT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """float32 [A, B, UNIT]: code times block scale, exact, times `decode`; NaN under a NaN scale."""
    if FORMAT == "nvfp4":
        value, scale = _spread(codes, 16), decode_e4m3(byte)
    else:
        value, scale = tl.reshape(_spread(codes, 8), [A, B, 32]), decode_e8m0(byte)
    return value * scale[:, :, None] * decode[:, :, None]


@triton.jit
def _spread(packed, COUNT: tl.constexpr):
    """float32 values of the COUNT lowest codes of each of `packed`, in a dimension of their own."""
    if COUNT == 2:
        low, high = packed & 0xF, (packed >> 4) & 0xF
        return tl.join(decode_e2m1(low.to(tl.int32)), decode_e2m1(high.to(tl.int32)))
    else:
        low, high = _spread(packed, COUNT // 2), _spread(packed >> (2 * COUNT), COUNT // 2)
        both = tl.join(low, high)
        if len(packed.shape) == 2:
            return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [packed.shape[0], packed.shape[1], COUNT])
        else:
            return tl.reshape(tl.permute(both, (0, 1, 2, 4, 3)), [packed.shape[0], packed.shape[1], packed.shape[2], COUNT])


@triton.jit
def _store(
    codes_ptr, scales_ptr, codes, byte, batch, row, group, wanted, rows, groups, row_span, group_span,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr,
):  # fmt: skip
    """Blocks [A, B] of `row` [A, 1] and `group` [1, B] where `wanted` [1, B]; scales, as zeros, up to (`row_span`, `group_span`)."""
    out_row = (batch * rows + row).to(tl.int64)
    inside = (row < rows) & (group < groups) & wanted
    codes_ptr = codes_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    if FORMAT == "nvfp4":
        tl.store(codes_ptr + out_row * groups + group, codes, mask=inside)
    else:
        first, second = tl.split(_two_words(tl.reshape(codes, [codes.shape[0], codes.shape[1], 2, 2])))
        where = codes_ptr + (out_row * groups + group) * 2
        tl.store(where, first, mask=inside)
        tl.store(where + 1, second, mask=inside)
    if SWIZZLED:
        where = scales_ptr + tl.cast(batch, tl.int64) * row_span * group_span + swizzled_offset(row, group, group_span // 4)
        tl.store(where, tl.where(inside, byte, 0).to(tl.uint8), mask=(row < row_span) & (group < group_span) & wanted)
    else:
        tl.store(scales_ptr + out_row * groups + group, byte.to(tl.uint8), mask=inside)

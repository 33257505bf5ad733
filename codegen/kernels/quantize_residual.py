"""Quantize kernels for activations with calibrated outliers: truth is `reference/residual.py`, and every bit agrees.

The order of the channels is applied while x is read, so it takes no pass of its own. A lane that has quantized an outlier block goes on
to what that lost, from registers; programs without outlier blocks skip it, and as those lie last in the order, few programs have them. The
global scale is found as in `quantize.py`, in the order that x has in memory, for a maximum has none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_load import load_tile
from fp4compile.codegen.kernels._tile_quantize import finite_max
from fp4compile.codegen.kernels._tile_residual import load_in_order, quantize_with_residuals
from fp4compile.codegen.kernels._tile_scale import encode_of, encode_scale, reciprocal, store_decode


@triton.jit(do_not_specialize_on_alignment=["order_ptr", "codes_ptr", "scales_ptr"])
def quantize_residual_kernel(
    x_ptr, order_ptr, amax_ptr, codes_ptr, scales_ptr, decode_ptr, static_amax, parts, rows, k, plain, blocks, row_tiles,
    row_span, group_span, stride_b, stride_r, stride_k,
    FORMAT: tl.constexpr, BOUND: tl.constexpr, SCALE_RULE: tl.constexpr, SWIZZLED: tl.constexpr, CAPABILITY: tl.constexpr,
    MOST_PARTS: tl.constexpr, BY_BLOCK: tl.constexpr, ACCESS: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Codes (batch, R, (Kp + outliers)/2), scale bytes, plain or swizzled, decode multipliers (batch). Grid (block tiles, steps, batch).

    `blocks` are those of x, the last of them, from `plain` on, outliers. `amax_ptr` as in `quantize_kernel`.
    """
    batch = tl.program_id(2)
    encode = encode_of(amax_ptr, static_amax, batch, parts, FORMAT, BOUND, MOST_PARTS)
    decode = reciprocal(encode, CAPABILITY)
    store_decode(decode_ptr, decode, batch, tl.program_id(0) + tl.program_id(1))
    x_ptr += batch.to(tl.int64) * stride_b
    block = tl.program_id(0) * B
    for tile in range(tl.program_id(1), row_tiles, tl.num_programs(1)):
        row = tile * A
        x = load_in_order(x_ptr, order_ptr, row, block, rows, k, blocks, stride_r, stride_k, BY_BLOCK, ACCESS, UNIT, A, B)
        quantize_with_residuals(
            x, encode, decode, codes_ptr, scales_ptr, batch, row, block, rows, plain, blocks, row_span, group_span,
            FORMAT, SCALE_RULE, SWIZZLED, CAPABILITY, A, B,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["order_ptr", "codes_ptr", "scales_ptr"])
def quantize_residual_here_kernel(
    x_ptr, order_ptr, codes_ptr, scales_ptr, decode_ptr, rows, k, plain, blocks, row_tiles, block_tiles,
    row_span, group_span, stride_b, stride_r, stride_k,
    BOUND: tl.constexpr, SCALE_RULE: tl.constexpr, SWIZZLED: tl.constexpr, CAPABILITY: tl.constexpr, PER_ROW: tl.constexpr,
    BY_BLOCK: tl.constexpr, ACCESS: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """NVFP4 with S of each row, or of a small matrix, which each program finds for itself.

    Grid (row tiles, steps along the blocks, batch). `row_tiles` and `block_tiles` are those of x; a tile of padding rows is empty.
    """
    row, batch = tl.program_id(0) * A, tl.program_id(2)
    x_ptr += batch.to(tl.int64) * stride_b
    largest = tl.zeros([A, B], tl.float32)
    first, count = (tl.program_id(0), 1) if PER_ROW else (0, row_tiles)
    for tile in range(count * block_tiles):
        from_row, from_block = (first + tile // block_tiles) * A, tile % block_tiles * B
        x = load_tile(x_ptr, from_row, from_block, rows, k, stride_r, stride_k, ACCESS, 1, False, UNIT, 0, A, B)
        largest = tl.maximum(largest, finite_max(x, A, B, UNIT))
    amax = tl.max(largest, axis=1)[:, None]
    if not PER_ROW:
        amax = tl.full([1, 1], 0.0, tl.float32) + tl.max(amax, axis=0)[:, None]
    encode = encode_scale(amax, BOUND)
    decode = reciprocal(encode, CAPABILITY)
    if PER_ROW:
        each = row + tl.arange(0, A)[:, None]
        tl.store(decode_ptr + batch * rows + each, decode, mask=(each < rows) & (tl.program_id(1) + 0 * each == 0))
    else:
        store_decode(decode_ptr, decode, batch, tl.program_id(0) + tl.program_id(1))
    for tile in range(tl.program_id(1), tl.cdiv(group_span - (blocks - plain), B), tl.num_programs(1)):
        block = tile * B
        x = load_in_order(x_ptr, order_ptr, row, block, rows, k, blocks, stride_r, stride_k, BY_BLOCK, ACCESS, UNIT, A, B)
        quantize_with_residuals(
            x, encode, decode, codes_ptr, scales_ptr, batch, row, block, rows, plain, blocks, row_span, group_span,
            "nvfp4", SCALE_RULE, SWIZZLED, CAPABILITY, A, B,
        )  # fmt: skip

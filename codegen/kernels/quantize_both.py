"""One kernel for two quantizations of a matrix, along its rows and along its columns, as training needs them: x comes from memory once.

A program takes a region, reads it the one way and then the other; the second reading finds it in a cache. Both halves are those of
`quantize.py`, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_load import load_tile
from fp4compile.codegen.kernels._tile_quantize import quantize_tile
from fp4compile.codegen.kernels._tile_scale import encode_of, reciprocal, store_decode


@triton.jit(do_not_specialize_on_alignment=["seed_ptr", "codes_ptr", "scales_ptr", "seed_t_ptr", "codes_t_ptr", "scales_t_ptr"])
def quantize_both_kernel(
    x_ptr, rows, columns, regions_down, stride_b, stride_r, row_stride,
    amax_ptr, static_amax, parts, seed_ptr, codes_ptr, scales_ptr, decode_ptr, groups, row_span, group_span,
    amax_t_ptr, static_amax_t, parts_t, seed_t_ptr, codes_t_ptr, scales_t_ptr, decode_t_ptr, groups_t, row_span_t, group_span_t,
    FORMAT: tl.constexpr, BOUND: tl.constexpr, IS_TILE: tl.constexpr, SCALE_RULE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SWIZZLED: tl.constexpr, ACCESS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr,
    FORMAT_T: tl.constexpr, BOUND_T: tl.constexpr, IS_TILE_T: tl.constexpr, SCALE_RULE_T: tl.constexpr, STOCHASTIC_T: tl.constexpr,
    SWIZZLED_T: tl.constexpr, ACCESS_T: tl.constexpr, UNIT_T: tl.constexpr, HADAMARD_T: tl.constexpr, STRIDE_T: tl.constexpr,
    CAPABILITY: tl.constexpr, MOST_PARTS: tl.constexpr, MOST_PARTS_T: tl.constexpr,
    DOWN: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """What `quantize_kernel` computes of (batch, rows, columns), and with `_t` of its transpose. Regions are DOWN x RIGHT.

    Grid (regions to the right, steps down, batch).
    """
    batch = tl.program_id(2)
    first = tl.program_id(0) + tl.program_id(1)
    encode = encode_of(amax_ptr, static_amax, batch, parts, FORMAT, BOUND, MOST_PARTS)
    encode_t = encode_of(amax_t_ptr, static_amax_t, batch, parts_t, FORMAT_T, BOUND_T, MOST_PARTS_T)
    decode, decode_t = reciprocal(encode, CAPABILITY), reciprocal(encode_t, CAPABILITY)
    store_decode(decode_ptr, decode, batch, first)
    store_decode(decode_t_ptr, decode_t, batch, first)
    x_ptr += batch.to(tl.int64) * stride_b
    column = tl.program_id(0) * RIGHT
    B: tl.constexpr = RIGHT // UNIT
    A: tl.constexpr = DOWN // UNIT_T
    for back in range(tl.program_id(1), regions_down, tl.num_programs(1)):
        row = (regions_down - 1 - back) * DOWN
        x = load_tile(x_ptr, row, column // UNIT, rows, columns, row_stride, 1, ACCESS, 1, False, UNIT, HADAMARD, DOWN, B)
        quantize_tile(
            x, encode, decode, seed_ptr, codes_ptr, scales_ptr, batch, row, column // UNIT, rows, groups, row_span, group_span,
            FORMAT, SCALE_RULE, IS_TILE, STOCHASTIC, SWIZZLED, CAPABILITY, False, UNIT, DOWN, B,
        )  # fmt: skip
        x = load_tile(x_ptr, column, row // UNIT_T, columns, rows, 1, stride_r, ACCESS_T, STRIDE_T, True, UNIT_T, HADAMARD_T, A, RIGHT)
        quantize_tile(
            x, encode_t, decode_t, seed_t_ptr, codes_t_ptr, scales_t_ptr, batch, column, row // UNIT_T, columns, groups_t,
            row_span_t, group_span_t, FORMAT_T, SCALE_RULE_T, IS_TILE_T, STOCHASTIC_T, SWIZZLED_T, CAPABILITY, True, UNIT_T, A, RIGHT,
        )  # fmt: skip

"""Block-scaled matrix product on tensor cores that multiply FP4 themselves.

Truth is `reference/matmul.py`, up to the order of the float32 sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_native import store_tile, tile_sum


@triton.jit
def native_mm_kernel(
    row_codes, row_scales, column_codes, column_scales, row_global_ptr, column_global_ptr, bias_ptr, out_ptr, out_desc,
    batches, rows, columns, turns, groups, row_step, column_step, scale_stride_b, scale_stride_r, scale_stride_c,
    row_global_stride_b, row_global_stride_r, column_global_stride_b, column_global_stride_r,
    bias_stride_b, bias_stride_r, bias_stride_c, out_stride_s, out_stride_b, out_stride_r, out_stride_c,
    BLOCK: tl.constexpr, COLUMN_SCALES: tl.constexpr, EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    PERSISTENT: tl.constexpr, SPECIALIZED: tl.constexpr,
    ONE_SUM: tl.constexpr,
):  # fmt: skip
    """out (batch, rows, columns) = rows (batch, R, K) times columns (batch, C, K) transposed, times global scales, plus bias.

    `row_step` and `column_step` are 0 where one matrix serves the whole batch; a scale belongs to BLOCK columns of k. PERSISTENT: a program
    computes every num_programs-th tile and loads the next one while it stores. Otherwise programs (t, s) sum share s of the `turns` for
    tile t, and write at `out_ptr` + s `out_stride_s`.
    """
    operands = (row_codes, row_scales, column_codes, column_scales)
    places = (row_global_ptr, column_global_ptr, bias_ptr, out_ptr + tl.program_id(1).to(tl.int64) * out_stride_s, out_desc)
    sizes = (rows, columns, turns, groups, row_step, column_step)
    scale_strides = (scale_stride_b, scale_stride_r, scale_stride_c)
    global_strides = (row_global_stride_b, row_global_stride_r, column_global_stride_b, column_global_stride_r)
    bias_strides = (bias_stride_b, bias_stride_r, bias_stride_c)
    out_strides = (out_stride_b, out_stride_r, out_stride_c)
    if PERSISTENT:
        tiles = batches * tl.cdiv(rows, BLOCK_R) * tl.cdiv(columns, BLOCK_C)
        for tile in tl.range(
            tl.program_id(0), tiles, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZED, disallow_acc_multi_buffer=ONE_SUM
        ):
            _multiply_tile(
                tile, operands, places, sizes, scale_strides, global_strides, bias_strides, out_strides,
                BLOCK, COLUMN_SCALES, EACH_ROW, EACH_COLUMN, BIAS, BLOCK_R, BLOCK_C, BLOCK_K, STAGES, PARTS, False, ONE_SUM,
            )  # fmt: skip
    else:
        _multiply_tile(
            tl.program_id(0), operands, places, sizes, scale_strides, global_strides, bias_strides, out_strides,
            BLOCK, COLUMN_SCALES, EACH_ROW, EACH_COLUMN, BIAS, BLOCK_R, BLOCK_C, BLOCK_K, STAGES, PARTS, SPECIALIZED, ONE_SUM,
        )  # fmt: skip


@triton.jit
def _multiply_tile(
    tile, operands, places, sizes, scale_strides, global_strides, bias_strides, out_strides,
    BLOCK: tl.constexpr, COLUMN_SCALES: tl.constexpr, EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    SPECIALIZED: tl.constexpr, ONE_SUM: tl.constexpr,
):  # fmt: skip
    rows, columns, turns, groups, row_step, column_step = sizes
    row_global_ptr, column_global_ptr, bias_ptr, out_ptr, out_desc = places
    batch, row_tile, column_tile = _tile_at(tile, tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_C))
    first_row, first_column = row_tile * BLOCK_R, column_tile * BLOCK_C
    row_batch, column_batch = batch * row_step, batch * column_step
    share = tl.cdiv(turns, tl.num_programs(1))
    first_turn = tl.program_id(1) * share
    acc = tile_sum(
        operands, row_batch * rows + first_row, row_batch, first_row, column_batch * columns + first_column, column_batch, first_column,
        first_turn, tl.minimum(first_turn + share, turns), columns, groups, scale_strides,
        BLOCK, COLUMN_SCALES, BLOCK_R, BLOCK_C, BLOCK_K, STAGES, SPECIALIZED, ONE_SUM,
    )  # fmt: skip
    store_tile(
        acc, row_global_ptr, column_global_ptr, bias_ptr, out_ptr, out_desc, batch, first_row, first_column, rows, columns,
        global_strides, bias_strides, out_strides, EACH_ROW, EACH_COLUMN, BIAS, PARTS, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@triton.jit
def _tile_at(tile, row_tiles, column_tiles):
    """(batch, row tile, column tile). Eight row tiles run together, so that they find the columns' tiles in L2."""
    batch = tile // (row_tiles * column_tiles)
    tile = tile % (row_tiles * column_tiles)
    band = 8 * column_tiles
    first = tile // band * 8
    height = tl.minimum(row_tiles - first, 8)
    return batch, first + tile % band % height, tile % band // height

"""Device helpers of the native block-scaled products: the sum over k of one tile, and its way out.

`tl.dot_scaled` multiplies e2m1 codes, two a byte along k, by block scales inside the tensor core: `tcgen05.mma` on sm_10x, `mma.sync` with
block scale on sm_12x. Its left operand, here "rows", fills the side of the instruction that has 128 of them; its right one, "columns", may
be as narrow as 8. Which of A and B is rows is the launcher's choice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_sum(
    operands, code_row, row_batch, first_row, code_column, column_batch, first_column, first_turn, last_turn, columns, groups, strides,
    BLOCK: tl.constexpr, COLUMN_SCALES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, SPECIALIZED: tl.constexpr, ONE_SUM: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_R, BLOCK_C] over turns `first_turn` .. `last_turn` of BLOCK_K columns of k. `operands` are codes and scales of both.

    `code_row` and `code_column` count rows of the 2-D code descriptors, `first_row` and `first_column` rows of one matrix. Descriptors give
    zeros outside. COLUMN_SCALES "descriptor": 5-D and swizzled, as those of rows; "swizzled" or "plain": a pointer, for tiles that are no
    whole blocks of 128 rows. `strides` are then those of (batch, row, group), where a swizzled row strides over its blocks of 4 groups.
    """
    row_codes, row_scales, column_codes, column_scales = operands
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for turn in tl.range(first_turn, last_turn, num_stages=STAGES, warp_specialize=SPECIALIZED, disallow_acc_multi_buffer=ONE_SUM):
        left = row_codes.load([code_row, turn * (BLOCK_K // 2)])
        right = column_codes.load([code_column, turn * (BLOCK_K // 2)])
        left_scales = _block_scales(row_scales, row_batch, first_row, turn, BLOCK, BLOCK_R, BLOCK_K)
        if COLUMN_SCALES == "descriptor":
            right_scales = _block_scales(column_scales, column_batch, first_column, turn, BLOCK, BLOCK_C, BLOCK_K)
        else:
            row = first_column + tl.arange(0, BLOCK_C)[:, None]
            group = turn * (BLOCK_K // BLOCK) + tl.arange(0, BLOCK_K // BLOCK)[None, :]
            if COLUMN_SCALES == "swizzled":
                where = (row // 128).to(tl.int64) * strides[1] * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group // 4 * 512 + group % 4
            else:
                where = row.to(tl.int64) * strides[1] + group * strides[2]
            present = (row < columns) & (group < groups)
            right_scales = tl.load(column_scales + column_batch * strides[0] + where, mask=present, other=0.0)
        acc = tl.dot_scaled(left, left_scales, "e2m1", right.T, right_scales, "e2m1", acc)
    return acc


@triton.jit
def _block_scales(scales, batch, first_row, turn, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales [ROWS, BLOCK_K / BLOCK] from a descriptor of (batch, R/128, C/4, 2, 256) bytes.

    512 bytes in a row are (32, 4, 4): row mod 32, row div 32, column. In this form Triton leaves them in shared memory, from where
    `tcgen05.cp` brings them to the tensor core.
    """
    COLUMNS: tl.constexpr = BLOCK_K // BLOCK // 4
    loaded = scales.load([batch, first_row // 128, turn * COLUMNS, 0, 0])
    return loaded.reshape(ROWS // 128, COLUMNS, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, BLOCK_K // BLOCK)


@triton.jit
def store_tile(
    acc, row_global_ptr, column_global_ptr, bias_ptr, out_ptr, out_desc, batch, first_row, first_column, rows, columns,
    global_strides, bias_strides, out_strides,
    EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, BIAS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`acc` times both global scales plus bias, in PARTS steps of columns: a whole tile of float32 would fill the registers.

    EACH_ROW, EACH_COLUMN: that global scale has a number for each of those, not one a matrix. BIAS: "none", "row", "column" (a number for
    each of those) or "matrix". Strides are (batch, row or column) of the global scales, (batch, row, column) of bias and out. `out_desc`
    (batch, rows, columns), or None for stores by `out_ptr`.
    """
    WIDTH: tl.constexpr = BLOCK_C // PARTS
    row = first_row + tl.arange(0, BLOCK_R)
    every_column = first_column + tl.arange(0, BLOCK_C)
    # Vectors over columns are loaded whole: Triton repeats a load of fewer elements than threads in each thread that wants them.
    row_global = _global_scale(row_global_ptr, batch, row, rows, global_strides[0], global_strides[1], EACH_ROW)
    column_global = _global_scale(column_global_ptr, batch, every_column, columns, global_strides[2], global_strides[3], EACH_COLUMN)
    column_bias = 0.0
    if BIAS == "column":
        where_bias = batch * bias_strides[0] + every_column.to(tl.int64) * bias_strides[2]
        column_bias = tl.load(bias_ptr + where_bias, mask=every_column < columns, other=0.0).to(tl.float32)
    sums = _parts(acc, PARTS, BLOCK_R, BLOCK_C)
    for i in tl.static_range(PARTS):
        start = first_column + i * WIDTH
        column = start + tl.arange(0, WIDTH)
        scale = _part(column_global, i, EACH_COLUMN, PARTS, BLOCK_C)
        if EACH_ROW:
            scale = row_global[:, None] * scale
        else:
            scale = row_global * scale
        value = sums[i] * scale
        if BIAS == "column":
            value += _part(column_bias, i, True, PARTS, BLOCK_C)
        elif BIAS != "none":
            value += _bias(bias_ptr, batch, row, column, rows, columns, bias_strides, BIAS)
        if out_desc is not None:
            out_desc.store([batch, first_row, start], value.to(out_desc.dtype).reshape(1, BLOCK_R, WIDTH))
        else:
            where = batch * out_strides[0] + row[:, None].to(tl.int64) * out_strides[1] + column[None, :].to(tl.int64) * out_strides[2]
            tl.store(out_ptr + where, value.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _global_scale(ptr, batch, index, count, stride_b, stride, EACH: tl.constexpr):
    """float32: one for each of `index` or, as most matrices have one, a scalar; 1 where there is none."""
    if EACH:
        return tl.load(ptr + batch * stride_b + index * stride, mask=index < count, other=1.0)
    elif ptr is not None:
        return tl.load(ptr + batch * stride_b)
    else:
        return 1.0


@triton.jit
def _bias(ptr, batch, row, column, rows, columns, strides, BIAS: tl.constexpr):
    """float32, [R, 1] for BIAS "row" and [R, C] for "matrix"."""
    where = batch * strides[0] + row[:, None].to(tl.int64) * strides[1]
    present = (row < rows)[:, None]
    if BIAS == "matrix":
        where += column[None, :].to(tl.int64) * strides[2]
        present &= (column < columns)[None, :]
    return tl.load(ptr + where, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _parts(acc, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] as PARTS tensors of neighbouring columns."""
    if PARTS == 1:
        return (acc,)
    elif PARTS == 2:
        return acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    else:
        low, high = acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        return _parts(low, 2, ROWS, COLUMNS // 2) + _parts(high, 2, ROWS, COLUMNS // 2)


@triton.jit
def _part(vector, i: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Part `i` of a vector over columns, as [1, COLUMNS / PARTS]; a scalar is itself."""
    if EACH:
        return _parts(vector[None, :], PARTS, 1, COLUMNS)[i]
    else:
        return vector

"""Native block-scaled product for mixtures of experts: each program finds its expert from the offsets on the device.

Truth is `reference/grouped.py`. Experts' matrices fill the side of the MMA that has 128 rows, tokens the one that may be narrow. A group of
tokens starts anywhere, not at a block of 128 scale rows, so their scales are gathered.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_native import store_tile, tile_sum
from fp4compile.codegen.kernels.scaled_grouped_mm import _group_rows


@triton.jit
def native_grouped_mm_kernel(
    row_codes, row_scales, column_codes, column_scales, row_global_ptr, column_global_ptr, offs_ptr, out_ptr,
    rows, total, groups, turns, scale_groups, offs_stride, scale_stride_r, scale_stride_c,
    row_global_stride_b, row_global_stride_r, column_global_stride_r,
    BLOCK: tl.constexpr, COLUMN_SCALES: tl.constexpr, EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out (T, N) contiguous: columns offs[g-1]..offs[g] of (T, K) times rows[g] (N, K) transposed. BLOCK_G > `groups`, a power of two."""
    row_tiles = tl.cdiv(rows, BLOCK_R)
    group, first, end = _group_rows(offs_ptr, offs_stride, tl.program_id(0) // row_tiles, total, groups, BLOCK_G, BLOCK_C)
    first, end, group = first.to(tl.int32), end.to(tl.int32), group.to(tl.int32)
    first_row = tl.program_id(0) % row_tiles * BLOCK_R
    if first >= end:
        return
    if group < groups:
        acc = tile_sum(
            (row_codes, row_scales, column_codes, column_scales), group * rows + first_row, group, first_row, first, 0, first, 0, turns,
            total, scale_groups, (0, scale_stride_r, scale_stride_c), BLOCK, COLUMN_SCALES, BLOCK_R, BLOCK_C, BLOCK_K, STAGES, False, True,
        )  # fmt: skip
        if row_global_ptr is not None:
            row_global_ptr += group.to(tl.int64) * row_global_stride_b
        store_tile(
            acc, row_global_ptr, column_global_ptr, None, out_ptr, None, 0, first_row, first, rows, end,
            (0, row_global_stride_r, 0, column_global_stride_r), (0, 0, 0), (0, 1, rows), EACH_ROW, EACH_COLUMN, "none",
            PARTS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        zeros = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        store_tile(
            zeros, None, None, None, out_ptr, None, 0, first_row, first, rows, end, (0, 0, 0, 0), (0, 0, 0), (0, 1, rows),
            False, False, "none", PARTS, BLOCK_R, BLOCK_C,
        )  # fmt: skip

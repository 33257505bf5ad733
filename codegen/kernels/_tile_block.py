"""What a block of a tile shares: its maximum, its quantization error, its random bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_e2m1 import decode


@triton.jit
def block_max(magnitude, IS_TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Maximum of `magnitude` [ROWS, GROUPS, 16] over each 1x16 or 16x16 block, [ROWS, GROUPS]."""
    row_max = tl.max(magnitude, axis=2)
    if IS_TILE:
        row_max = _spread(tl.max(tl.reshape(row_max, [ROWS // 16, 16, GROUPS]), axis=1), ROWS, GROUPS)
    return row_max


@triton.jit
def block_error(scaled, codes, scale, SCALE_RULE: tl.constexpr, IS_TILE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Error of each block against `scaled` = x S [ROWS, GROUPS, 16], on [ROWS, GROUPS]; sums run as trees of adjacent pairs."""
    difference = scaled - decode(codes) * scale[:, :, None]
    if SCALE_RULE == "four_over_six_absmax":
        error = tl.max(tl.abs(difference), axis=2)
        if IS_TILE:
            error = _spread(tl.max(tl.reshape(error, [ROWS // 16, 16, GROUPS]), axis=1), ROWS, GROUPS)
    else:
        if SCALE_RULE == "four_over_six_mae":
            each = tl.abs(difference)
        else:
            tl.static_assert(SCALE_RULE == "four_over_six")
            each = difference * difference
        error = _sum_adjacent(each, ROWS, GROUPS)
        if IS_TILE:
            columns = tl.permute(tl.reshape(error, [ROWS // 16, 16, GROUPS]), (0, 2, 1))
            error = _spread(_sum_adjacent(columns, ROWS // 16, GROUPS), ROWS, GROUPS)
    return error


@triton.jit
def _sum_adjacent(x, A: tl.constexpr, B: tl.constexpr):
    """Sum over the last dimension of `x` [A, B, 16] as a tree of adjacent pairs."""
    x = _add_pairs(tl.reshape(x, [A, B, 8, 2]))
    x = _add_pairs(tl.reshape(x, [A, B, 4, 2]))
    x = _add_pairs(tl.reshape(x, [A, B, 2, 2]))
    return _add_pairs(x)


@triton.jit
def _add_pairs(x):
    left, right = tl.split(x)
    return left + right


@triton.jit
def _spread(per_tile, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """[ROWS/16, GROUPS] repeated over the 16 rows of each tile, [ROWS, GROUPS]."""
    return tl.reshape(tl.broadcast_to(per_tile[:, None, :], [ROWS // 16, 16, GROUPS]), [ROWS, GROUPS])


@triton.jit
def random_bytes(seed, group):
    """Bytes (int32, [R, G, 16]) of Philox4x32-10 for counters (group, 0, 0, 0): byte i of word j belongs to element 4 j + i."""
    counter = group.to(tl.uint32)
    zero = tl.zeros_like(counter)
    word_0, word_1, word_2, word_3 = tl.philox(seed, counter, zero, zero, zero)
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # [R, G, 2, 2], word 2 p + q at [p, q]
    shift = (tl.arange(0, 4) * 8).to(tl.uint32)
    spread = (words[:, :, :, :, None] >> shift[None, None, None, None, :]) & 0xFF
    return tl.reshape(spread, [group.shape[0], group.shape[1], 16]).to(tl.int32)

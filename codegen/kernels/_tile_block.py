"""What a block of a tile shares: its maximum, its quantization error, its random numbers. A block is a lane's; see `_tile_load.py`.

TILE is 0 for blocks of one row. For 16x16 blocks it is 1 where rows run along the first dimension of a tile and 2 where along the second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_minifloat import bits_float


@triton.jit
def lane_max(magnitude, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Maximum of float32 `magnitude` [A, B, N] over its last dimension, [A, B]; NaN if one of them is."""
    if N == 1:
        return tl.reshape(magnitude, [A, B])
    else:
        even, odd = tl.split(tl.reshape(magnitude, [A, B, N // 2, 2]))
        return lane_max(tl.maximum(even, odd, propagate_nan=tl.PropagateNan.ALL), A, B, N // 2)


@triton.jit
def block_max(magnitude, TILE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """The same over each block, whose rows all get it. Bits of magnitudes are ordered as integers, with NaN above Inf."""
    largest = lane_max(magnitude, A, B, N)
    if TILE == 0:
        return largest
    else:
        return bits_float(_over_tile_rows(largest.to(tl.int32, bitcast=True), "max", TILE, A, B))


@triton.jit
def block_error(difference, SCALE_RULE: tl.constexpr, TILE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Error of each block by `difference` [A, B, 16]; sums run as trees of adjacent pairs."""
    if SCALE_RULE == "four_over_six_absmax":
        error = _fold(tl.abs(difference), "max", A, B, 16)
        return _over_tile_rows(error, "max", TILE, A, B)
    else:
        if SCALE_RULE == "four_over_six_mae":
            each = tl.abs(difference)
        else:
            tl.static_assert(SCALE_RULE == "four_over_six")
            each = difference * difference
        return _over_tile_rows(_fold(each, "sum", A, B, 16), "sum", TILE, A, B)


@triton.jit
def lane_sum(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Sum of float32 `x` [A, B, N] over its last dimension, [A, B], as a tree of adjacent pairs."""
    return _fold(x, "sum", A, B, N)


@triton.jit
def _fold(x, HOW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    if N == 1:
        return tl.reshape(x, [A, B])
    else:
        even, odd = tl.split(tl.reshape(x, [A, B, N // 2, 2]))
        return _fold(tl.maximum(even, odd) if HOW == "max" else even + odd, HOW, A, B, N // 2)


@triton.jit
def _over_tile_rows(x, HOW: tl.constexpr, TILE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """`x` [A, B] folded over each 16 rows and repeated on them."""
    if TILE == 0:
        return x
    elif TILE == 1:
        folded = _fold(tl.permute(tl.reshape(x, [A // 16, 16, B]), (0, 2, 1)), HOW, A // 16, B, 16)
        return tl.reshape(tl.broadcast_to(folded[:, None, :], [A // 16, 16, B]), [A, B])
    else:
        folded = _fold(tl.reshape(x, [A, B // 16, 16]), HOW, A, B // 16, 16)
        return tl.reshape(tl.broadcast_to(folded[:, :, None], [A, B // 16, 16]), [A, B])


@triton.jit
def scale_fractions(seed, block):
    """Fractions k / 2^20, float32 in the shape of `block`: 20 bits of the first word for counters (block, 0, 0, 0)."""
    counter = block.to(tl.uint32)
    zero = tl.zeros_like(counter)
    word, _, _, _ = tl.philox(seed, counter, zero, zero, zero)
    return (word & 0x000FFFFF).to(tl.int32).to(tl.float32) * 9.5367431640625e-07


@triton.jit
def random_fractions(seed, group, A: tl.constexpr, B: tl.constexpr):
    """Bytes of Philox4x32-10 for counters (group, 0, 0, 0) times 2^-9, float32 [A, B, 16]: byte i of word j belongs to element 4 j + i."""
    counter = group.to(tl.uint32)
    zero = tl.zeros_like(counter)
    word_0, word_1, word_2, word_3 = tl.philox(seed, counter, zero, zero, zero)
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # [A, B, 2, 2], word 2 p + q at [p, q]
    low, high = _two_fractions(words), _two_fractions(words >> 16)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 2, 3, 5, 4)), [A, B, 16])


@triton.jit
def _two_fractions(words):
    """The two low bytes of each of `words` times 2^-9. As the mantissa's low bits of a number from 1 on they need no conversion."""
    low = ((words & 0x000000FF) | 0x3F800000).to(tl.float32, bitcast=True)
    high = ((words & 0x0000FF00) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.join(tl.fma(low, 16384.0, -16384.0), tl.fma(high, 64.0, -64.0))  # exact

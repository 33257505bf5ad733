"""Random Hadamard transform of a tile along its columns: the device twin of `reference/hadamard.py`, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate(x, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rotate float32 `x` [ROWS, COLS] in groups of SIZE (16, 32, 64 or 128) columns; sign first, then H / sqrt(SIZE).

    A stage pairs neighbours and stores sums and differences as two halves, which moves the lowest bit of the column index to the
    top. So each stage finds its partners side by side, and after log2(SIZE) stages every column is back in its place.
    """
    tl.static_assert(COLS % SIZE == 0)
    tl.static_assert(SIZE == 16 or SIZE == 32 or SIZE == 64 or SIZE == 128)
    column = tl.arange(0, COLS)
    negative = (0xD7E8 >> (column & 15)) & 1  # reference.hadamard.SIGN_MASK
    y = x * tl.where(negative == 1, -1.0, 1.0)[None, :]
    y = _stage(_stage(_stage(_stage(y, SIZE, ROWS, COLS), SIZE, ROWS, COLS), SIZE, ROWS, COLS), SIZE, ROWS, COLS)
    if SIZE >= 32:
        y = _stage(y, SIZE, ROWS, COLS)
    if SIZE >= 64:
        y = _stage(y, SIZE, ROWS, COLS)
    if SIZE >= 128:
        y = _stage(y, SIZE, ROWS, COLS)
    norm: tl.constexpr = 1.0 / SIZE**0.5
    return y * norm


@triton.jit
def _stage(y, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    a, b = tl.split(tl.reshape(y, [ROWS, COLS // SIZE, SIZE // 2, 2]))
    halves = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    return tl.reshape(halves, [ROWS, COLS])

"""Tiles of units: UNIT consecutive elements along the quantized axis, all in the registers of one lane.

A block's maximum, its error, a rotation, the packing of its codes then never leave a lane. Rows of a matrix are read through 16-byte
loads where K is contiguous (QUADS); where the rows are, a lane reads pairs of neighbouring rows as words (PAIRS); anything else element
by element (ELEMENTS). Tiles are [A, B, UNIT]: [rows, units], or [units, rows] where ACROSS, so that B runs along memory in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_hadamard import rotate
from fp4compile.codegen.kernels._tile_minifloat import bits_float

ELEMENTS = tl.constexpr(0)
QUADS = tl.constexpr(1)
PAIRS = tl.constexpr(2)


@triton.jit
def load_tile(
    x_ptr, row, unit, rows, k, stride_r, stride_k,
    ACCESS: tl.constexpr, STRIDE_K: tl.constexpr, ACROSS: tl.constexpr, UNIT: tl.constexpr, HADAMARD: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """float32 [A, B, UNIT] of rows and units starting at `row` and `unit`, rotated and rounded to the input's dtype; zero outside."""
    if ACCESS == QUADS:
        x = _load_quads(x_ptr, row, unit, rows, k, stride_r, UNIT, A, B)
    elif ACCESS == PAIRS:
        x = _load_pairs(x_ptr, row, unit, rows, k, STRIDE_K, UNIT, A, B)
    else:
        x = _load_elements(x_ptr, row, unit, rows, k, stride_r, stride_k, ACROSS, UNIT, A, B)
    if HADAMARD > 0:
        x = rotated(x, x_ptr.dtype.element_ty, HADAMARD, A, B, UNIT)
    return x


@triton.jit
def rotated(x, DTYPE: tl.constexpr, HADAMARD: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr):
    """float32 `x` [A, B, UNIT] rotated and rounded to DTYPE."""
    y = rotate(tl.reshape(x, [A, B * UNIT]), HADAMARD, A, B * UNIT)
    return tl.reshape(y, [A, B, UNIT]).to(DTYPE).to(tl.float32)


@triton.jit
def _load_quads(x_ptr, row, unit, rows, k, stride_r, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Rows of whole units, contiguous and at multiples of 16 bytes, which `stride_r` counts."""
    row = (row + tl.arange(0, A))[:, None]
    unit = (unit + tl.arange(0, B))[None, :]
    return load_unit_quads(x_ptr, row, unit, (row < rows) & (unit < k // UNIT), stride_r, UNIT, A, B)


@triton.jit
def load_unit_quads(x_ptr, row, unit, inside, stride_r, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """float32 [A, B, UNIT] of `row` [A, 1] and `unit` [1, B], which need not follow each other."""
    WIDE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    QUADS_A_UNIT: tl.constexpr = UNIT // 4 if WIDE else UNIT // 8
    first = row.to(tl.int64) * stride_r * 4 + unit * (4 * QUADS_A_UNIT)
    words = _load_words(x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first, inside, QUADS_A_UNIT, A, B)
    if WIDE:
        return bits_float(words)
    else:
        return _halves(words, x_ptr.dtype.element_ty, UNIT // 2, A, B)


@triton.jit
def _load_words(address, inside, COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """int32 [A, B, 4 COUNT] that follow each address [A, B]."""
    if COUNT == 1:
        return tl.load(address[:, :, None] + tl.arange(0, 4)[None, None, :], mask=inside[:, :, None], other=0)
    else:
        low = _load_words(address, inside, COUNT // 2, A, B)
        high = _load_words(address + 2 * COUNT, inside, COUNT // 2, A, B)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [A, B, 4 * COUNT])


@triton.jit
def _halves(words, DTYPE: tl.constexpr, COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """float32 [A, B, 2 COUNT] of int32 `words` [A, B, COUNT] that hold two DTYPE each."""
    return tl.reshape(tl.join(_low_half(words, DTYPE), _high_half(words, DTYPE)), [A, B, 2 * COUNT])


@triton.jit
def _low_half(word, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return bits_float(word << 16)
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _high_half(word, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return bits_float(word & -0x10000)
    else:
        return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_pairs(x_ptr, row, unit, rows, k, STRIDE_K: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Whole units across an even number of contiguous rows of 16-bit elements. STRIDE_K, in words, is a constant: it costs nothing."""
    pair = row // 2 + tl.arange(0, B // 2)
    unit = unit + tl.arange(0, A)
    first = unit[:, None].to(tl.int64) * (UNIT * STRIDE_K) + pair[None, :]
    inside = (unit < k // UNIT)[:, None] & (pair < rows // 2)[None, :]
    words = _load_across(x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + first, inside, STRIDE_K, UNIT, A, B // 2)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    both = tl.permute(tl.join(_low_half(words, DTYPE), _high_half(words, DTYPE)), (0, 1, 3, 2))
    return tl.reshape(both, [A, B, UNIT])


@triton.jit
def _load_across(address, inside, STRIDE_K: tl.constexpr, COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """int32 [A, B, COUNT] at every STRIDE_K-th word from `address` [A, B] on."""
    if COUNT == 2:
        return tl.join(tl.load(address, mask=inside, other=0), tl.load(address + STRIDE_K, mask=inside, other=0))
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _load_across(address, inside, STRIDE_K, HALF, A, B)
        high = _load_across(address + HALF * STRIDE_K, inside, STRIDE_K, HALF, A, B)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [A, B, COUNT])


@triton.jit
def _load_elements(
    x_ptr, row, unit, rows, k, stride_r, stride_k, ACROSS: tl.constexpr, UNIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    if ACROSS:
        row = (row + tl.arange(0, B))[None, :]
        first_k = ((unit + tl.arange(0, A)) * UNIT)[:, None]
    else:
        row = (row + tl.arange(0, A))[:, None]
        first_k = ((unit + tl.arange(0, B)) * UNIT)[None, :]
    return load_each(x_ptr + row.to(tl.int64) * stride_r, first_k, row < rows, k, stride_k, UNIT, A, B)


@triton.jit
def load_each(address, first_k, inside, k, stride_k, COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """float32 [A, B, COUNT] of single elements at `first_k` and what follows it."""
    if COUNT == 2:
        low = tl.load(address + first_k.to(tl.int64) * stride_k, mask=inside & (first_k < k), other=0.0)
        high = tl.load(address + (first_k + 1).to(tl.int64) * stride_k, mask=inside & (first_k + 1 < k), other=0.0)
        return tl.join(low.to(tl.float32), high.to(tl.float32))
    else:
        low = load_each(address, first_k, inside, k, stride_k, COUNT // 2, A, B)
        high = load_each(address, first_k + COUNT // 2, inside, k, stride_k, COUNT // 2, A, B)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [A, B, COUNT])

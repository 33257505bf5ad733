"""One operand of a matrix product as a tile of exact values, whatever it is stored as, and the epilogue that all products share.

e2m1 times e4m3 has six significant bits and lies in 2^-10 .. 2688, so it is exact in bfloat16 and in float16; e2m1 times e8m0 is exact in
bfloat16 wherever float32 can hold it. So the tensor core sees the very operands that block-scaled hardware multiplies. Formats with flagged
blocks are in `_tile_flagged.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_e2m1 import decode, unpack
from fp4compile.codegen.kernels._tile_flagged import decode_by_flag
from fp4compile.codegen.kernels._tile_scale import decode_e4m3, decode_e8m0


@triton.jit
def load_operand(
    ptr, scales_ptr, row, rows, start_k, k, stride_r, stride_k, scale_stride_r, scale_stride_k,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Values [BLOCK_R, BLOCK_K] in DTYPE of rows `row` (int64) and columns from `start_k`; zero outside (rows, k)."""
    column = start_k + tl.arange(0, BLOCK_K)
    present = (row < rows)[:, None]
    if FORMAT == "none":
        where = row[:, None] * stride_r + column[None, :].to(tl.int64) * stride_k
        return tl.load(ptr + where, mask=present & (column < k)[None, :], other=0.0).to(DTYPE)
    else:
        BLOCK: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
        GROUPS: tl.constexpr = BLOCK_K // BLOCK
        pair = start_k // 2 + tl.arange(0, BLOCK_K // 2)
        where = row[:, None] * stride_r + pair[None, :].to(tl.int64) * stride_k
        packed = tl.load(ptr + where, mask=present & (2 * pair < k)[None, :], other=0)
        group = start_k // BLOCK + tl.arange(0, GROUPS)
        where_scale = row[:, None] * scale_stride_r + group[None, :].to(tl.int64) * scale_stride_k
        byte = tl.load(scales_ptr + where_scale, mask=present & (BLOCK * group < k)[None, :], other=0)
        codes = unpack(packed, BLOCK_R, BLOCK_K)
        if FORMAT == "nvfp4" or FORMAT == "mxfp4":
            scale = decode_e4m3(byte) if FORMAT == "nvfp4" else decode_e8m0(byte)
            values = tl.reshape(decode(codes), [BLOCK_R, GROUPS, BLOCK]) * scale[:, :, None]
        else:
            values = decode_by_flag(codes, byte, FORMAT, BLOCK_R, GROUPS, BLOCK) * decode_e4m3(byte & 0x7F)[:, :, None]
        # Codes between k and the next whole block are no zeros where the operand was rotated.
        return tl.where((column < k)[None, :], tl.reshape(values, [BLOCK_R, BLOCK_K]), 0.0).to(DTYPE)


@triton.jit
def empty_sum(B_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """float32 zeros for `multiply_accumulate` to add to: [BLOCK_M, BLOCK_N], transposed with B_FIRST."""
    if B_FIRST:
        return tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def multiply_accumulate(acc, a, b, B_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """`acc` + a [M, K] times b [N, K] transposed, in float32. With B_FIRST the dot is b times a transposed, [N, M] as `acc` then is."""
    if B_FIRST:
        return tl.dot(b, tl.trans(a), acc, input_precision=PRECISION, out_dtype=tl.float32)
    else:
        return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def finished_sum(acc, B_FIRST: tl.constexpr):
    """What `multiply_accumulate` summed, as [M, N]."""
    if B_FIRST:
        return tl.trans(acc)
    else:
        return acc


@triton.jit
def load_global_scale(ptr, batch, row, rows, stride_b, stride_r, BLOCK_R: tl.constexpr):
    """float32 multipliers [BLOCK_R]; 1 where the operand has none."""
    if ptr is None:
        return tl.full([BLOCK_R], 1.0, tl.float32)
    else:
        return tl.load(ptr + batch * stride_b + row * stride_r, mask=row < rows, other=1.0)


@triton.jit
def load_columns(at, inner, left, MASKED: tl.constexpr):
    """The tile at addresses `at` [R, BLOCK_K] whose columns are `inner`; with MASKED zero from column `left` on."""
    if MASKED:
        return tl.load(at, mask=(inner < left)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_result(acc, bias_ptr, out_ptr, batch, row, column, m, n, bias_stride_b, bias_stride_m, bias_stride_n):
    """out (batch, M, N), contiguous, at `row` and `column` (int64) = `acc`, plus the bias where there is one; one rounding."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    if bias_ptr is not None:
        where_bias = batch * bias_stride_b + row[:, None] * bias_stride_m + column[None, :] * bias_stride_n
        acc = acc + tl.load(bias_ptr + where_bias, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + (batch * m + row[:, None]) * n + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)

"""Weight-only product for tens to hundreds of rows of x on sm_80: weights decoded in registers meet x in shared memory.

Not for sm_90, where the dot would be a `wgmma` that Triton leaves in flight while its registers are written again: `hopper_mm` there.

A dot may take k in any order that both operands share. Here it is the order in which a lane that reads whole 32-bit words of codes holds
what the tensor core wants of that lane, so the decoded weight never moves between threads; x is brought into that order beforehand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.codegen.kernels._tile_decode import decode_pair, decode_scales, finish, multiply_pairs, nan_flags, tiled_pair


@triton.jit
def wide_decode_mm_kernel(
    x_ptr, codes_ptr, scales_ptr, a_global_ptr, b_global_ptr, bias_ptr, out_ptr,
    m, n, padded_k, codes_stride, scales_stride, x_stride, a_global_stride, b_global_stride,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr,
    MASKED: tl.constexpr, FP16: tl.constexpr, PDL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """out (M, N) contiguous; x (M, `x_stride`) as `pair_columns_kernel` leaves it; codes as int32 words.

    Scales are int16, two a lane, or int32 where TILED, four a lane. Strides are of a row of the weight, or of a tile of 16 rows where it is
    TILED. A turn is 128 CHUNKS of k.
    """
    HALF: tl.constexpr = tl.float16 if FP16 else tl.bfloat16
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, 16 * CHUNKS)[None, :]
    lane_scale = tl.arange(0, 4 * CHUNKS)[None, :]
    codes_at, scales_at = _addresses(codes_ptr, scales_ptr, row, word, lane_scale, n, codes_stride, scales_stride, BLOCK_N, TILED)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_at = x_ptr + tl.minimum(column, m - 1).to(tl.int64)[:, None] * x_stride + tl.arange(0, 128 * CHUNKS)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for done in tl.range(0, padded_k, 128 * CHUNKS, num_stages=STAGES):
        if MASKED:
            words = tl.load(codes_at, mask=word * 8 + done < padded_k, other=0)
            scales = tl.load(scales_at, mask=lane_scale * 32 + done < padded_k, other=0)
        else:
            words = tl.load(codes_at)
            scales = tl.load(scales_at)
        x = tl.load(x_at)
        a = _decode(words, scales, BLOCK_N, CHUNKS, TILED, FP16, PTX)
        acc = tl.dot(a.to(HALF, bitcast=True), tl.trans(x), acc)
        codes_at += 256 * CHUNKS if TILED else 16 * CHUNKS
        scales_at += 32 * CHUNKS if TILED else 4 * CHUNKS
        x_at += 128 * CHUNKS

    acc = finish(
        acc, a_global_ptr, b_global_ptr, bias_ptr, row[:, None], n, column[None, :], m, a_global_stride, b_global_stride, FP16
    )  # fmt: skip
    inside = (row < n)[:, None] & (column < m)[None, :]
    tl.store(out_ptr + column.to(tl.int64)[None, :] * n + row[:, None], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _addresses(codes_ptr, scales_ptr, row, word, lane_scale, n, codes_stride, scales_stride, BLOCK_N: tl.constexpr, TILED: tl.constexpr):
    """Where the words and scales of the first turn are. Rows past `n` read the last ones."""
    if TILED:
        # Scales of rows g and g + 8 share a word, so their tensor has half the rows.
        pair_row = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        last = tl.cdiv(n, 16) - 1
        codes_at = codes_ptr + (tl.minimum(row // 16, last).to(tl.int64) * codes_stride + row % 16 * 16)[:, None]
        codes_at += word // 16 * 256 + word % 16
        scales_at = scales_ptr + (tl.minimum(pair_row // 8, last).to(tl.int64) * scales_stride + pair_row % 8 * 4)[:, None]
        scales_at += lane_scale // 4 * 32 + lane_scale % 4
    else:
        row_in = tl.minimum(row, n - 1).to(tl.int64)[:, None]
        codes_at = codes_ptr + row_in * codes_stride + word
        scales_at = scales_ptr + row_in * scales_stride + lane_scale
    return codes_at, scales_at


@triton.jit
def _decode(words, scales, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, TILED: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr):
    """[BLOCK_N, 128 CHUNKS] int16 bits of 16 CHUNKS words a row, in the order of k that leaves every half in its register.

    Dimensions: tile of 16 rows, h and g (row 8 h + g), chunk of 128 k, lane t, word 2 j1 + j0 of the lane, and nibble 4 e + 2 u + c.
    """
    words = tl.reshape(words, [BLOCK_N // 16, 2, 8, CHUNKS, 4, 2, 2])  # [tile, h, g, chunk, t, j1, j0]
    if TILED:
        both = tl.reshape(scales, [BLOCK_N // 16, 8, CHUNKS, 4])
        top = _scale_pairs(both, FP16, PTX)
        bottom = _scale_pairs(both >> 16, FP16, PTX)
        scale = tl.permute(tl.join(top, bottom), (0, 5, 1, 2, 3, 4))  # j1 and h come last before it
    else:
        scale = _scale_pairs(tl.reshape(scales, [BLOCK_N // 16, 2, 8, CHUNKS, 4]).to(tl.int32), FP16, PTX)
    if TILED:
        every = _halves(_tiled_pairs(words, scale, FP16, PTX))  # [tile, h, g, chunk, t, j1, pair's bits 2 to 0, e]
        every = tl.permute(every, (0, 1, 2, 3, 5, 6, 7, 8, 4, 9))  # ... chunk, j1, pair, t, e]
        return tl.reshape(every, [BLOCK_N, 128 * CHUNKS])
    scale = tl.broadcast_to(tl.expand_dims(scale, 6), words.shape)
    n0 = _halves(multiply_pairs(decode_pair(words, 0, FP16), scale, FP16, PTX))
    n1 = _halves(multiply_pairs(decode_pair(words, 1, FP16), scale, FP16, PTX))
    n2 = _halves(multiply_pairs(decode_pair(words, 2, FP16), scale, FP16, PTX))
    n3 = _halves(multiply_pairs(decode_pair(words, 3, FP16), scale, FP16, PTX))
    every = tl.join(tl.join(n0, n1), tl.join(n2, n3))  # [tile, h, g, chunk, t, j1, j0, e, c, u]
    return tl.reshape(tl.permute(every, (0, 1, 2, 3, 5, 6, 9, 8, 4, 7)), [BLOCK_N, 128 * CHUNKS])  # ... chunk, j1, j0, u, c, t, e]


@triton.jit
def _tiled_pairs(words, scale, FP16: tl.constexpr, PTX: tl.constexpr):
    """[..., 2, 2, 2]: the eight pairs of each two `words`, times their `scale`."""
    first, second = tl.split(words)
    p0 = multiply_pairs(tiled_pair(first, second, 0, FP16), scale, FP16, PTX)
    p1 = multiply_pairs(tiled_pair(first, second, 1, FP16), scale, FP16, PTX)
    p2 = multiply_pairs(tiled_pair(first, second, 2, FP16), scale, FP16, PTX)
    p3 = multiply_pairs(tiled_pair(first, second, 3, FP16), scale, FP16, PTX)
    p4 = multiply_pairs(tiled_pair(first, second, 4, FP16), scale, FP16, PTX)
    p5 = multiply_pairs(tiled_pair(first, second, 5, FP16), scale, FP16, PTX)
    p6 = multiply_pairs(tiled_pair(first, second, 6, FP16), scale, FP16, PTX)
    p7 = multiply_pairs(tiled_pair(first, second, 7, FP16), scale, FP16, PTX)
    return tl.join(tl.join(tl.join(p0, p4), tl.join(p2, p6)), tl.join(tl.join(p1, p5), tl.join(p3, p7)))


@triton.jit
def _scale_pairs(two, FP16: tl.constexpr, PTX: tl.constexpr):
    """[..., j1]: pairs of the two low bytes of `two`; NaN stays NaN."""
    first, second = decode_scales(two, FP16, PTX)
    flags = nan_flags(two)
    return tl.join(tl.where((flags & 0x80) != 0, 0x7FFF7FFF, first), tl.where((flags & 0x8000) != 0, 0x7FFF7FFF, second))


@triton.jit
def _halves(pair):
    """[..., e]: the low and the high half as int16 bits."""
    return tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))


@triton.jit
def pair_columns_kernel(x_ptr, out_ptr, k, stride_r, stride_k, padded_k, TILED: tl.constexpr, PDL: tl.constexpr):
    """x (M, K) to (M, `padded_k`), a multiple of 128, zero-padded, each 128 columns in the order that `_decode` gives a weight."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    e, t, c = at % 2, at // 2 % 4, at // 8 % 2
    u, j = at // 16 % 2, at // 32 % 4
    source = at // 128 * 128 + t * 32 + j * 8 + (u * 4 + c * 2 + e if TILED else e * 4 + u * 2 + c)
    value = tl.load(x_ptr + row * stride_r + source.to(tl.int64) * stride_k, mask=source < k, other=0.0)
    tl.store(out_ptr + row * padded_k + at, value, mask=at < padded_k)


@triton.jit
def pair_tiled_columns_kernel(x_ptr, out_ptr, pairs, stride_r, padded_pairs, PDL: tl.constexpr):
    """As `pair_columns_kernel` for a tiled weight, on int32 x (M, `pairs`), two neighbouring columns each, to (M, `padded_pairs`)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    source = at // 64 * 64 + at % 4 * 16 + at // 16 % 4 * 4 + at // 8 % 2 * 2 + at // 4 % 2
    value = tl.load(x_ptr + row * stride_r + source, mask=source < pairs, other=0)
    tl.store(out_ptr + row * padded_pairs + at, value, mask=at < padded_pairs)

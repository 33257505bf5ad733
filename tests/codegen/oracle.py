"""A second implementation of the quantizers, on numpy and ml_dtypes only, that shares no line with the package it judges.

NVFP4 in the order of operations of TransformerEngine, each step one float32 rounding; MXFP4 after OCP Microscaling 1.0. Two rules are
this project's own: a block that holds an Inf or NaN gets the NaN scale, and the tensor maximum is taken over the finite values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], F32)
SIXTH = np.array([0x3E2AAAAB], np.uint32).view(F32)[0]
FLT_MAX = np.finfo(F32).max


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """codes (..., R, Kp) one a byte, scale bytes (..., R, Kp/block), decode multiplier (...) or (..., R)."""

    codes: Bytes
    scales: Bytes
    decode: Array


def e2m1_codes(y: Array) -> Bytes:
    return y.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF


def e4m3_bytes(t: Array) -> Bytes:
    return np.minimum(t, F32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8) & 0x7F


def e4m3_values(scale_bytes: Bytes) -> Array:
    return scale_bytes.view(ml_dtypes.float8_e4m3fn).astype(F32)


def zero_padded(x: Array, block: int) -> Array:
    missing = -x.shape[-1] % block
    return np.concatenate([x, np.zeros((*x.shape[:-1], missing), F32)], axis=-1)


def nvfp4(
    x: Array,
    *,
    rule: str = "amax",
    granularity: str = "tensor",
    tile: bool = False,
    static_amax: float | None = None,
    random_bytes: Bytes | None = None,
) -> Quantized:
    """Quantize float32 `x` (..., R, K) along its last dimension; `random_bytes` (same shape, padded) makes the rounding stochastic."""
    with np.errstate(all="ignore"):
        x = zero_padded(np.asarray(x, F32), 16)
        bound = 2688 if rule == "amax" else 1536
        magnitude = np.where(np.isfinite(x), np.abs(x), F32(0))
        if static_amax is not None:
            amax = np.full(x.shape[:-2], static_amax, F32)
        else:
            amax = magnitude.max(axis=-1 if granularity == "row" else (-2, -1), initial=0)
        encode = np.minimum(F32(bound) / amax, FLT_MAX).astype(F32)
        encode = np.where(amax == 0, F32(1), encode).astype(F32)
        decode = (F32(1) / encode).astype(F32)
        s = encode[..., None] if encode.ndim == x.ndim - 1 else encode[..., None, None]  # (..., R or 1, 1)

        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
        largest = per_tile(np.abs(blocks).max(-1), np.max) if tile else np.abs(blocks).max(-1)
        wanted = largest * (s * SIXTH)
        chosen = e4m3_bytes(wanted)
        codes = block_codes(blocks, chosen, F32(1) / s, random_bytes)
        if rule != "amax":
            wider = e4m3_bytes(wanted * F32(1.5))
            wider_codes = block_codes(blocks, wider, F32(1) / s, random_bytes)
            scaled = blocks * s[..., None]
            better = block_loss(scaled, wider_codes, wider, rule, tile) < block_loss(scaled, codes, chosen, rule, tile)
            chosen = np.where(better, wider, chosen)
            codes = np.where(better[..., None], wider_codes, codes)
        chosen = np.where(np.isfinite(largest), chosen, np.uint8(0x7F)).astype(np.uint8)
        return Quantized(codes=codes.reshape(x.shape), scales=chosen, decode=decode)


def block_codes(blocks: Array, scale_bytes: Bytes, decode: Array, random_bytes: Bytes | None) -> Bytes:
    multiplier = np.minimum(F32(1) / (e4m3_values(scale_bytes) * decode), FLT_MAX)
    y = blocks * multiplier[..., None]
    return e2m1_codes(y) if random_bytes is None else stochastic_codes(y, random_bytes.reshape(y.shape))


def stochastic_codes(y: Array, random_bytes: Bytes) -> Bytes:
    """Raise the magnitude by byte/256 of its step, then take the grid value below: the software model of `cvt.rs.satfinite.e2m1x4`."""
    magnitude = np.minimum(np.abs(y), F32(6))
    step = np.select([magnitude < 2, magnitude < 4], [F32(0.5), F32(1)], F32(2))
    raised = magnitude + random_bytes.astype(F32) / F32(256) * step
    floor = np.searchsorted(E2M1[:8], raised, side="right") - 1
    return (floor + 8 * np.signbit(y)).astype(np.uint8)


def block_loss(scaled: Array, codes: Bytes, scale_bytes: Bytes, rule: str, tile: bool) -> Array:
    """Loss of each block in units of the encoded tensor, summed as a binary tree over neighbours."""
    error = np.abs(scaled - E2M1[codes] * e4m3_values(scale_bytes)[..., None])
    if rule == "four_over_six_absmax":
        return per_tile(error.max(-1), np.max) if tile else error.max(-1)
    each = error if rule == "four_over_six_mae" else error * error
    return per_tile(tree_sum(each), lambda a, axis: tree_sum(np.moveaxis(a, axis, -1))) if tile else tree_sum(each)


def tree_sum(x: Array) -> Array:
    """Sum over the last dimension, a power of two long."""
    if x.shape[-1] == 1:
        return x[..., 0]
    return tree_sum((x[..., 0::2] + x[..., 1::2]).astype(F32))


def per_tile(per_block: Array, reduce: Callable[..., Array]) -> Array:
    """Reduce (..., R, C) over each group of 16 rows, absent rows counting as zero, and give every row its group's value."""
    rows = per_block.shape[-2]
    out = np.empty_like(per_block)
    for first in range(0, rows, 16):
        group = per_block[..., first : first + 16, :]
        absent = np.zeros((*group.shape[:-2], 16 - group.shape[-2], group.shape[-1]), F32)
        out[..., first : first + 16, :] = np.expand_dims(reduce(np.concatenate([group, absent], axis=-2), axis=-2), -2)
    return out


def mxfp4(x: Array, *, random_bytes: Bytes | None = None) -> Quantized:
    """Blocks of 32 with the scale 2^(floor(log2 max) - 2), at least 2^-127."""
    with np.errstate(all="ignore"):
        x = zero_padded(np.asarray(x, F32), 32)
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
        largest = np.abs(blocks).max(-1)
        exponent = np.where(largest > 0, np.frexp(np.where(np.isfinite(largest), largest, 1))[1] - 1, -1000)
        exponent = np.maximum(exponent - 2, -127)
        y = (blocks.astype(np.float64) * np.exp2(-exponent.astype(np.float64))[..., None]).astype(F32)
        codes = e2m1_codes(y) if random_bytes is None else stochastic_codes(y, random_bytes.reshape(y.shape))
        scales = np.where(np.isfinite(largest), exponent + 127, 255).astype(np.uint8)
        return Quantized(codes=codes.reshape(x.shape), scales=scales, decode=np.ones(x.shape[:-2], F32))


def dequantized(q: Quantized, scale_values: Array) -> NDArray[np.float64]:
    """Exact values in float64."""
    block = q.codes.shape[-1] // q.scales.shape[-1]
    values = E2M1[q.codes].astype(np.float64) * np.repeat(scale_values.astype(np.float64), block, axis=-1)
    trailing = (1,) * (q.codes.ndim - q.decode.ndim)
    return values * q.decode.astype(np.float64).reshape(*q.decode.shape, *trailing)


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Random123's Philox4x32 with 10 rounds, on Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_bytes(seed: int, shape: tuple[int, ...]) -> Bytes:
    """The bytes of stochastic rounding for a padded tensor: group g of 16 elements reads counter (g, 0, 0, 0), low byte first."""
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    groups = int(np.prod(shape)) // 16
    words = np.array([philox4x32_10((g, 0, 0, 0), key) for g in range(groups)], dtype="<u4").reshape(groups, 4)
    return words.view(np.uint8).reshape(shape)


def hadamard_matrix(size: int) -> Array:
    """(size, size) with H[i, j] = (-1)^popcount(i and j), rows negated where bit i mod 16 of 0xD7E8 is set; not normalized."""
    signs = [-1 if 0xD7E8 >> (i % 16) & 1 else 1 for i in range(size)]
    return np.array([[signs[i] * (-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)], F32)


def mismatches(q: Quantized, codes: Bytes, scales: Bytes) -> tuple[int, int]:
    """How many codes and scale bytes differ. -0 counts as 0, and codes under a zero or NaN scale mean nothing."""
    block = q.codes.shape[-1] // q.scales.shape[-1]
    nan = 0x7F if block == 16 else 0xFF
    meaningless = (q.scales == nan) | ((q.scales == 0) & (block == 16))
    ours, theirs = (np.where(c == 8, 0, c) for c in (codes, q.codes))
    differs = (ours != theirs) & ~np.repeat(meaningless, block, axis=-1)
    return int(differs.sum()), int((scales != q.scales).sum())

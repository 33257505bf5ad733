"""Host side of quantization: the CUDA implementations of `fp4::quantize` and `fp4::hadamard`. Results are contiguous.

Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.formats import E2M1_MAX, GlobalScale, Layout, QuantConfig, Rounding, round_up
from fp4compile.codegen.kernels.quantize import amax_kernel, hadamard_kernel, mxfp4_kernel, nvfp4_kernel
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.target import target_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_QUANTIZE_LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}  # FMA would change bits


@dataclass(frozen=True, kw_only=True)
class _Matrices:
    """A tensor seen as (batch, R, K) with K the axis being quantized."""

    data: Tensor
    batch_shape: torch.Size
    padded_k: int

    @classmethod
    def of(cls, x: Tensor, axis: int, k_multiple: int) -> _Matrices:
        moved = x if axis == -1 else x.mT
        data = moved.reshape(-1, *moved.shape[-2:]) if moved.numel() else moved.new_empty((moved.shape[:-2].numel(), *moved.shape[-2:]))
        return cls(data=data, batch_shape=x.shape[:-2], padded_k=round_up(data.shape[-1], k_multiple))

    @property
    def rows(self) -> int:
        return self.data.shape[1]

    def arguments(self) -> tuple[int, ...]:
        """rows, k, padded_k and strides, as the kernels take them."""
        return (self.rows, self.data.shape[2], self.padded_k, *self.data.stride())

    def tile(self, least_k: int, elements: int) -> tuple[int, int]:
        """BLOCK_R, BLOCK_K of about `elements`: wide along the contiguous dimension, at least a 16x16 block."""
        if self.data.stride(1) == 1 and self.data.stride(2) != 1:
            block_k = max(least_k, 64)
        else:
            block_k = max(least_k, 256)
        return max(16, elements // block_k), block_k

    def programs(self, block_r: int, block_k: int) -> tuple[int]:
        batch, rows, _ = self.data.shape
        return (batch * max(1, -(-rows // block_r)) * max(1, -(-self.padded_k // block_k)),)


def quantize(
    x: Tensor,
    axis: int,
    format: str,
    block: str,
    scale_rule: str,
    global_scale: str,
    rounding: str,
    hadamard: int,
    static_amax: float | None = None,
    seed: Tensor | None = None,
    *,
    layout: str = Layout.PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fp4::quantize`: see `reference.block.quantize_ref`, with which every bit agrees."""
    if layout != Layout.PLAIN:
        codes, scales, decode = quantize(x, axis, format, block, scale_rule, global_scale, rounding, hadamard, static_amax, seed)
        return *lay_out_ref(codes, scales, layout), decode
    config = _config(format, block, scale_rule, global_scale, rounding, hadamard, static_amax)
    _check(x, "fp4::quantize", format)
    matrices = _Matrices.of(x, axis, config.k_multiple)
    rows, padded_k = matrices.rows, matrices.padded_k
    codes = x.new_empty((*matrices.batch_shape, rows, padded_k // 2), dtype=torch.uint8)
    scales = x.new_empty((*matrices.batch_shape, rows, padded_k // config.fmt.block), dtype=config.fmt.scale_dtype)
    per_row = (rows,) if config.global_scale is GlobalScale.ROW else ()
    decode_shape = (*matrices.batch_shape, *per_row)
    block_r, block_k = matrices.tile(max(config.k_multiple, 64), 4096)
    grid = matrices.programs(block_r, block_k)
    stochastic = config.rounding is Rounding.STOCHASTIC
    if not grid[0]:
        return codes, scales, x.new_ones(decode_shape, dtype=torch.float32)
    assert seed is not None or not stochastic, "stochastic rounding draws from a seed"

    bytes_ = scales.view(torch.uint8)
    shared = {"STOCHASTIC": stochastic, "HADAMARD": hadamard, "BLOCK_R": block_r, "BLOCK_K": block_k, **_QUANTIZE_LAUNCH}
    seed = seed if stochastic else None
    with on_device_of(x):
        if not config.fmt.has_global_scale:
            mxfp4_kernel[grid](matrices.data, seed, codes, bytes_, *matrices.arguments(), **shared)
            return codes, scales, x.new_ones(decode_shape, dtype=torch.float32)
        decode = x.new_empty(decode_shape, dtype=torch.float32)
        nvfp4_kernel[grid](
            matrices.data, _amax(matrices, config, decode), seed, codes, bytes_, decode, *matrices.arguments(),
            BOUND=E2M1_MAX * config.scale_rule.e4m3_bound, IS_TILE=config.is_tile, SCALE_RULE=str(config.scale_rule),
            PER_ROW=bool(per_row), **shared,
        )  # fmt: skip
    return codes, scales, decode


def _amax(matrices: _Matrices, config: QuantConfig, decode: Tensor) -> Tensor:
    """int32 bits of the maximum magnitude, shaped as `decode`."""
    if config.global_scale is GlobalScale.STATIC:
        return torch.full_like(decode, config.static_amax or 0.0).view(torch.int32)
    amax = torch.zeros_like(decode, dtype=torch.int32)
    block_r, block_k = matrices.tile(max(config.hadamard, 64), 8192)
    amax_kernel[matrices.programs(block_r, block_k)](
        matrices.data, amax, *matrices.arguments(), PER_ROW=config.global_scale is GlobalScale.ROW,
        HADAMARD=config.hadamard, BLOCK_R=block_r, BLOCK_K=block_k, **_QUANTIZE_LAUNCH,
    )  # fmt: skip
    return amax


def hadamard(x: Tensor, axis: int, size: int) -> Tensor:
    """`fp4::hadamard`: `x` with `axis` zero-padded to a multiple of `size` and rotated in groups of it."""
    _check(x, "fp4::hadamard", "a rotated tensor")
    matrices = _Matrices.of(x, axis, size)
    shape = list(x.shape)
    shape[axis] = matrices.padded_k
    out = x.new_empty(shape)
    if not out.numel():
        return out
    moved = out if axis == -1 else out.mT
    block_r, block_k = matrices.tile(max(size, 64), 4096)
    with on_device_of(x):
        hadamard_kernel[matrices.programs(block_r, block_k)](
            matrices.data, out, *matrices.arguments(), *moved.reshape(-1, *moved.shape[-2:]).stride(),
            HADAMARD=size, BLOCK_R=block_r, BLOCK_K=block_k, **_QUANTIZE_LAUNCH,
        )  # fmt: skip
    return out


@functools.cache
def _config(
    format: str, block: str, scale_rule: str, global_scale: str, rounding: str, hadamard: int, static_amax: float | None
) -> QuantConfig:  # fmt: skip
    return QuantConfig(
        format=format, block=block, scale_rule=scale_rule, global_scale=global_scale, rounding=rounding,  # type: ignore[arg-type]
        hadamard=hadamard, static_amax=static_amax,
    )  # fmt: skip


known_target = functools.cache(target_of)


def _check(x: Tensor, where: str, fmt: str) -> None:
    if x.dtype not in _FLOATS:
        raise UnsupportedDtype(where=where, found=x.dtype, fmt=fmt)
    known_target(x.device, where=where)


@contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of the tensor."""
    with torch.cuda.device_of(x):
        yield

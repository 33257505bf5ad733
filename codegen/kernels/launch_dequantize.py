"""Host side of `dequantize` and `dequantize_words`: decoding codes, and laying a weight's codes out in tiles."""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from fp4compile.codegen.formats import round_up
from fp4compile.codegen.kernels.dequantize import dequantize_kernel, tile_weight_kernel
from fp4compile.codegen.kernels.dequantize_words import dequantize_plain_kernel, dequantize_tiled_kernel
from fp4compile.codegen.kernels.kernel_call import KernelCall, kinds_of, on_device
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.block_scales import each_element

EXACT_IN_BFLOAT16: Final = (torch.float8_e4m3fn, torch.float8_e8m0fnu)  # dtypes of the block scales of formats that `dequantize` takes
_LAUNCH: Final = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def dequantize(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """(..., R, k rounded up to 8) in `dtype`, zero from column k on: codes (..., R, Kp/2) times their block scales, with any strides.

    `dtype` is bfloat16, or float16 for NVFP4.
    """
    if _has_whole_words(codes, scales, k):
        return _dequantize_words(codes.flatten(0, -2), scales.flatten(0, -2), k, dtype).view(*scales.shape[:-1], k)
    codes, bytes_ = _stacked(codes), _stacked(scales.view(torch.uint8))
    batch, rows, _ = codes.shape
    out = codes.new_empty((batch, rows, round_up(k, 8)), dtype=dtype)
    if out.numel():
        block_r, block_k = 16, 256
        dequantize_kernel[(-(-rows // block_r) * -(-out.shape[2] // block_k), batch)](
            codes, bytes_, out, rows, k, *codes.stride(), *bytes_.stride(), out.shape[2],
            NVFP4=scales.dtype == torch.float8_e4m3fn, BLOCK_R=block_r, BLOCK_K=block_k, **_LAUNCH,
        )  # fmt: skip
    return out.view(*scales.shape[:-1], out.shape[2])


def decoded(codes: Tensor, scales: Tensor, global_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """`fp4::dequantize`, (..., R, k) in `dtype`: one rounding, of exact values times the global scale."""
    if scales.dtype not in EXACT_IN_BFLOAT16:
        return dequantize_ref(codes, scales, global_scale)[..., :k].to(dtype).contiguous()
    with on_device(codes):
        values = dequantize(codes, scales, k, torch.bfloat16)[..., :k]
    return (values.float() * each_element(global_scale, values)).to(dtype).contiguous()


def _has_whole_words(codes: Tensor, scales: Tensor, k: int) -> bool:
    """Whether these are the rows of one NVFP4 matrix whose blocks are whole, eight aligned bytes each."""
    one = codes.ndim == 2 or (codes.is_contiguous() and scales.is_contiguous())
    aligned = codes.stride(-1) == 1 and codes.data_ptr() % 8 == 0 and (codes.shape[-2] == 1 or codes.stride(-2) % 8 == 0)
    return one and aligned and k == 2 * codes.shape[-1] and scales.dtype == torch.float8_e4m3fn and codes.numel() > 0


def _dequantize_words(codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    rows, blocks = scales.shape
    out = codes.new_empty((rows, k), dtype=dtype)
    words, bytes_ = codes.view(torch.int64), scales.view(torch.uint8)
    if bytes_.stride(1) != 1:
        bytes_ = bytes_.contiguous()
    tensors = (words, bytes_, out.view(torch.int32))
    _decoding(rows, blocks, words.stride(0), bytes_.stride(0), dtype is torch.float16, codes.device, kinds_of(*tensors))(*tensors)
    return out


@functools.lru_cache(maxsize=4096)
def _decoding(
    rows: int, blocks: int, codes_stride: int, scales_stride: int, fp16: bool, device: torch.device, kinds: tuple[object, ...]
) -> KernelCall:
    block_r, block_c = 4, 128
    return KernelCall(
        dequantize_plain_kernel, (-(-rows // block_r) * -(-blocks // block_c),), _LAUNCH,
        rows=rows, blocks=blocks, codes_stride=codes_stride, scales_stride=scales_stride,
        FP16=fp16, PTX=device.type == "cuda", BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip


def dequantize_tiled(codes: Tensor, scales: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(n, 128 C) in `dtype`, bfloat16 or float16: tiled NVFP4 codes (T, C, 1024), contiguous, times their block scales (T, C, 128)."""
    _, chunks, _ = codes.shape
    out = codes.new_empty((n, 128 * chunks), dtype=dtype)
    tensors = (codes.view(torch.int64), scales.view(torch.uint8), out.view(torch.int32))
    _decoding_tiles(n, chunks, dtype is torch.float16, codes.device, kinds_of(*tensors))(*tensors)
    return out


@functools.lru_cache(maxsize=4096)
def _decoding_tiles(n: int, chunks: int, fp16: bool, device: torch.device, kinds: tuple[object, ...]) -> KernelCall:
    block_c = 4
    return KernelCall(
        dequantize_tiled_kernel, (-(-n // 16) * -(-chunks // block_c),), _LAUNCH,
        rows=n, chunks=chunks, blocks=8 * chunks, FP16=fp16, PTX=device.type == "cuda", BLOCK_C=block_c,
    )  # fmt: skip


def tile_on_device(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Tiled codes (..., T, C, 1024) and scales (..., T, C, 128) of plain NVFP4 ones, as `lay_out_ref` has them, with any strides."""
    *lead, rows, half_k = codes.shape
    blocks = scales.shape[-1]
    flat, bytes_ = _stacked(codes), _stacked(scales.view(torch.uint8))
    tiles, chunks = round_up(rows, 16) // 16, round_up(half_k, 64) // 64
    tiled, tiled_scales = codes.new_empty((*lead, tiles, chunks, 1024)), codes.new_empty((*lead, tiles, chunks, 128))
    if tiled.numel():
        tensors, strides = (flat, bytes_, tiled, tiled_scales), (*flat.stride(), *bytes_.stride())
        _tiling(flat.shape[0], tiles, (rows, half_k, blocks, chunks), strides, codes.device, kinds_of(*tensors))(*tensors)
    return tiled, tiled_scales.view(scales.dtype)


@functools.lru_cache(maxsize=4096)
def _tiling(
    batch: int, tiles: int, sizes: tuple[int, int, int, int], strides: tuple[int, ...], device: torch.device, kinds: tuple[object, ...]
) -> KernelCall:
    names = [f"{what}_stride_{axis}" for what in ("codes", "scales") for axis in "brk"]
    numbers = dict(zip(("rows", "half_k", "blocks", "chunks"), sizes, strict=True)) | dict(zip(names, strides, strict=True))
    return KernelCall(tile_weight_kernel, (tiles * -(-sizes[3] // 4), batch), _LAUNCH, **numbers, BLOCK_C=4)


def _stacked(x: Tensor) -> Tensor:
    """(batch, R, C)."""
    return x.reshape(-1, *x.shape[-2:]) if x.ndim != 3 else x

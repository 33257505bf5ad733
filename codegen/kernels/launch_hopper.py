"""Host side of the sm_90 products of `hopper_mm`: splits of k, descriptors, launches."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp4compile.codegen.formats import round_up
from fp4compile.codegen.kernels.hopper_mm import hopper_mm_kernel
from fp4compile.codegen.kernels.hopper_tiles import HopperTile
from fp4compile.codegen.kernels.kernel_call import KernelCall, kinds_of
from fp4compile.codegen.kernels.scaled_grouped_mm import group_tiles_kernel
from fp4compile.codegen.kernels.sum_splits import sum_splits_kernel

_STEP: Final = 64
_HALF_TILES: Final = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
_CODE_TILES: Final = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
_SCALE_TILES: Final = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


def multiply_hopper(
    x: Tensor, codes: Tensor, scales: Tensor, a_global: Tensor | None, b_global: Tensor | None, bias: Tensor | None, out: Tensor,
    tile: HopperTile,
) -> None:  # fmt: skip
    """out (M, N) contiguous = x (M, K), bfloat16 or float16, times an NVFP4 weight transposed, times the global scales, plus bias (N).

    Codes (T, C, 1024) and scales (T, C, 128) are tiled and contiguous. A global scale is a number, or one a row of x or of the weight.
    """
    m, n = out.shape
    chunks = codes.shape[1]
    a_split, splits = splits_of(chunks, tile.splits)
    last = (a_global, b_global, bias)
    strides = (stride_of(a_global), stride_of(b_global))
    partial = out if splits == 1 else out.new_empty((splits, m, n), dtype=torch.float32)
    pointers = (*(last if splits == 1 else (None, None, None)), None, partial)
    grid, numbers = (tile.count(m, n), splits), (m, n, chunks, a_split, 0, strides[0], 0, strides[1], m * n)
    product = _product(tile, grid, numbers, x.dtype is torch.float16, x.device, kinds_of(*pointers))
    product(*_descriptors(x, codes, scales, tile), *pointers)
    finish_splits(partial, last, out, splits)


_NUMBERS: Final = (
    "m", "n", "chunks", "chunks_a_split", "tiles_a_group", "a_global_stride", "b_group_stride", "b_global_stride", "split_stride"
)  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _product(
    tile: HopperTile, grid: tuple[int, int], numbers: tuple[int, ...], fp16: bool, device: torch.device, kinds: tuple[object, ...]
) -> KernelCall:
    """The kernel on descriptors of x and of the weight, whose blocks and dtypes `tile` and `fp16` decide, and on tensors of `kinds`."""
    return KernelCall(hopper_mm_kernel, grid, tile.options(), FP16=fp16, **dict(zip(_NUMBERS, numbers, strict=True)))


def splits_of(chunks: int, wanted: int) -> tuple[int, int]:
    """(chunks of a split, splits) of about `wanted` splits, none of them empty."""
    a_split = -(-chunks // wanted)
    return a_split, -(-chunks // a_split)


def finish_splits(partial: Tensor, last: tuple[Tensor | None, Tensor | None, Tensor | None], out: Tensor, splits: int) -> None:
    """Where there is more than one, the sum of `partial` (splits, M, N) with the epilogue (global scales of A and B, bias) to `out`."""
    if splits > 1:
        m, n = out.shape
        tensors, strides = (partial, *last, out), (stride_of(last[0]), stride_of(last[1]))
        _summing(m, n, splits, strides, out.device, kinds_of(*tensors))(*tensors)


@functools.lru_cache(maxsize=4096)
def _summing(m: int, n: int, splits: int, strides: tuple[int, int], device: torch.device, kinds: tuple[object, ...]) -> KernelCall:
    return KernelCall(
        sum_splits_kernel, (-(-m * n // 1024),), {"num_warps": 4, "enable_fp_fusion": False}, n=n, elements=m * n,
        a_global_stride=strides[0], b_global_stride=strides[1], SPLITS=splits, BLOCK=1024,
    )  # fmt: skip


def multiply_groups_hopper(
    x: Tensor, codes: Tensor, scales: Tensor, a_global: Tensor | None, b_global: Tensor | None, offs: Tensor, out: Tensor, tile: HopperTile
) -> None:
    """Rows of out (M, N), contiguous and zero, = rows of x (M, K) times the weight that `offs` (G) gives them, times the global scales.

    Codes (G, T, C, 1024) and scales (G, T, C, 128) are tiled and contiguous; `b_global` is (G) or (G, N), contiguous.
    """
    m, n = out.shape
    groups, tiles, chunks, _ = codes.shape
    row_tiles = -(-m // tile.block_m) + groups
    described = torch.empty((row_tiles, 3), dtype=torch.int32, device=x.device)
    group_tiles_kernel[(row_tiles,)](
        offs, offs.stride(0), described, m, groups, BLOCK_G=1 << groups.bit_length(), BLOCK_M=tile.block_m,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    per_row = b_global is not None and b_global.ndim == 2
    pointers, grid = (a_global, b_global, None, described, out), (row_tiles * -(-n // tile.block_n), 1)
    numbers = (row_tiles, n, chunks, chunks, tiles, stride_of(a_global), n if per_row else 1, 1 if per_row else 0, 0)
    product = _product(tile, grid, numbers, x.dtype is torch.float16, x.device, kinds_of(*pointers))
    product(*_descriptors(x, codes.flatten(0, 1), scales.flatten(0, 1), tile), *pointers)


def _descriptors(x: Tensor, codes: Tensor, scales: Tensor, tile: HopperTile) -> tuple[Any, Any, Any]:
    return x_descriptor(x, tile.block_m), *code_descriptors(codes, scales, tile.block_n // 16)


def code_descriptors(codes: Tensor, scales: Tensor, height: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Chunks of `height` tiles of tiled codes and scales."""
    tiles, chunks, _ = codes.shape
    codes_desc = TensorDescriptor(codes.view(torch.int32), [tiles, 8 * chunks, 32], [256 * chunks, 32, 1], [height, 8, 32], _CODE_TILES)
    scales_desc = TensorDescriptor(scales.view(torch.int32), [tiles, chunks, 32], [32 * chunks, 32, 1], [height, 1, 32], _SCALE_TILES)
    return codes_desc, scales_desc


def stride_of(global_scale: Tensor | None) -> int:
    return 0 if global_scale is None or global_scale.numel() == 1 else global_scale.stride(0)


def x_descriptor(x: Tensor, block_m: int) -> TensorDescriptor:
    """Tiles of `x` (M, K); a copy where its rows do not begin at multiples of 16 bytes, as TMA wants them."""
    rows, k = x.shape
    stride = x.stride(0) if rows > 1 else round_up(k, 8)
    if x.stride(1) != 1 or stride % 8 or stride < k or x.data_ptr() % 16:
        stride = round_up(k, 8)
        copy = x.new_empty((rows, stride))
        copy[:, :k] = x
        x = copy
    return TensorDescriptor(x, [rows, k], [stride, 1], [block_m, _STEP], _HALF_TILES)

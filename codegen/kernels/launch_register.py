"""Host side of the sm_90 products of `register_mm`: the order of x, launches."""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from fp4compile.codegen.kernels.hopper_tiles import RegisterTile
from fp4compile.codegen.kernels.kernel_call import KernelCall, kinds_of
from fp4compile.codegen.kernels.launch_hopper import code_descriptors, finish_splits, splits_of, stride_of, x_descriptor
from fp4compile.codegen.kernels.register_mm import register_mm_kernel
from fp4compile.codegen.kernels.wide_decode_mm import pair_columns_kernel, pair_tiled_columns_kernel
from fp4compile.codegen.target import processors_of


def multiply_register(
    x: Tensor, codes: Tensor, scales: Tensor, a_global: Tensor | None, b_global: Tensor | None, bias: Tensor | None, out: Tensor,
    tile: RegisterTile,
) -> None:  # fmt: skip
    """As `multiply_hopper`."""
    m, n = out.shape
    chunks = codes.shape[1]
    a_split, splits = splits_of(chunks, tile.splits)
    paired = _paired(x, chunks, tile.early)
    last = (a_global, b_global, bias)
    partial = out if splits == 1 else out.new_empty((splits, m, n), dtype=torch.float32)
    tiles = tile.count(m, n)
    room = processors_of(x.device) * tile.programs_a_processor if x.is_cuda else tiles
    pointers = (*(last if splits == 1 else (None, None, None)), partial)
    product = _product(
        tile, (min(tiles, max(1, room // splits)), splits), (m, n, chunks, a_split, stride_of(a_global), stride_of(b_global)),
        x.dtype is torch.float16, x.device, kinds_of(*pointers),
    )  # fmt: skip
    product(x_descriptor(paired, tile.block_m), *code_descriptors(codes, scales, 4 * tile.groups), *pointers)
    finish_splits(partial, last, out, splits)


@functools.lru_cache(maxsize=4096)
def _product(
    tile: RegisterTile, grid: tuple[int, int], numbers: tuple[int, int, int, int, int, int], fp16: bool, device: torch.device,
    kinds: tuple[object, ...],
) -> KernelCall:  # fmt: skip
    """The kernel on descriptors of x and of the weight, whose blocks and dtypes `tile` and `fp16` decide, and on tensors of `kinds`."""
    m, n, chunks, a_split, a_stride, b_stride = numbers
    return KernelCall(
        register_mm_kernel, grid, tile.options() | ({"launch_pdl": True} if tile.early else {}),
        m=m, n=n, chunks=chunks, chunks_a_split=a_split, a_global_stride=a_stride, b_global_stride=b_stride, split_stride=m * n, FP16=fp16,
    )  # fmt: skip


def _paired(x: Tensor, chunks: int, early: bool) -> Tensor:
    """x (M, K) as (M, 128 `chunks`), zero-padded, its columns in the order in which lanes hold the weight."""
    m, k = x.shape
    paired = x.new_empty((m, 128 * chunks))
    if x.stride(1) == 1 and k % 2 == 0 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0:
        words, out = x.view(torch.int32), paired.view(torch.int32)
        _pairing_words(m, k // 2, words.stride(0), out.shape[1], early, x.device, kinds_of(words, out))(words, out)
    else:
        _pairing(m, k, x.stride(), paired.shape[1], early, x.device, kinds_of(x, paired))(x, paired)
    return paired


_PAIRING: Final = {"num_warps": 4, "enable_fp_fusion": False}


@functools.lru_cache(maxsize=4096)
def _pairing_words(
    m: int, pairs: int, stride: int, padded_pairs: int, early: bool, device: torch.device, kinds: tuple[object, ...]
) -> KernelCall:
    grid = (m, -(-padded_pairs // 1024))
    return KernelCall(pair_tiled_columns_kernel, grid, _PAIRING, pairs=pairs, stride_r=stride, padded_pairs=padded_pairs, PDL=early)


@functools.lru_cache(maxsize=4096)
def _pairing(
    m: int, k: int, strides: tuple[int, ...], padded_k: int, early: bool, device: torch.device, kinds: tuple[object, ...]
) -> KernelCall:
    return KernelCall(
        pair_columns_kernel, (m, -(-padded_k // 1024)), _PAIRING,
        k=k, stride_r=strides[0], stride_k=strides[1], padded_k=padded_k, TILED=True, PDL=early,
    )  # fmt: skip

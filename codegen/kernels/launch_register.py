"""Host side of the sm_90 products of `register_mm`: the order of x, launches."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.codegen.kernels.hopper_tiles import RegisterTile
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
    tiles = -(-m // tile.block_m) * -(-n // (64 * tile.groups))
    room = processors_of(x.device) * tile.programs_a_processor if x.is_cuda else tiles
    register_mm_kernel[(min(tiles, max(1, room // splits)), splits)](
        x_descriptor(paired, tile.block_m), *code_descriptors(codes, scales, 4 * tile.groups),
        *(last if splits == 1 else (None, None, None)), partial,
        m, n, chunks, a_split, stride_of(a_global), stride_of(b_global), m * n, FP16=x.dtype is torch.float16, **tile.options(),
        **({"launch_pdl": True} if tile.early else {}),
    )  # fmt: skip
    finish_splits(partial, last, out, splits)


def _paired(x: Tensor, chunks: int, early: bool) -> Tensor:
    """x (M, K) as (M, 128 `chunks`), zero-padded, its columns in the order in which lanes hold the weight."""
    m, k = x.shape
    paired = x.new_empty((m, 128 * chunks))
    if x.stride(1) == 1 and k % 2 == 0 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0:
        words, out = x.view(torch.int32), paired.view(torch.int32)
        pair_tiled_columns_kernel[(m, -(-out.shape[1] // 1024))](
            words, out, k // 2, words.stride(0), out.shape[1], PDL=early, num_warps=4, enable_fp_fusion=False
        )
    else:
        pair_columns_kernel[(m, -(-paired.shape[1] // 1024))](
            x, paired, k, *x.stride(), paired.shape[1], TILED=True, PDL=early, num_warps=4, enable_fp_fusion=False
        )
    return paired

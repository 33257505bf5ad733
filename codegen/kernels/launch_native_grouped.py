"""Host side of the native grouped product: operands as in `launch_native`, a tile by the mean number of tokens of a group, the launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernels.launch_native import NativeOperand, is_vector
from fp4compile.codegen.kernels.native_grouped_mm import native_grouped_mm_kernel
from fp4compile.codegen.kernels.native_tiles import Architecture, NativeTile, architecture_of


def scaled_grouped_mm(
    a: Tensor,
    a_scales: Tensor,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor,
    b_global: Tensor | None,
    offs: Tensor,
    k: int,
    out_dtype: torch.dtype,
    *,
    a_layout: str = Layout.PLAIN,
    b_layout: str = Layout.PLAIN,
    capability: int,
    chosen: NativeTile | None = None,
) -> Tensor:
    """`fp4::scaled_grouped_mm` of what `launch_native.serves` accepts, on a device of `capability`; `chosen` instead of `grouped_tile`."""
    architecture = architecture_of(capability)
    assert architecture is not None, "ask `serves` first"
    total, groups, n = a.shape[0], b.shape[0], b.shape[-2]
    out = a.new_empty((total, n), dtype=out_dtype)
    if not out.numel():
        return out
    if not groups:
        return out.zero_()
    tile = chosen or grouped_tile(architecture, -(-total // groups))
    tokens = NativeOperand.of(a, a_scales, a_global, a_layout, torch.Size(()), k)
    experts = NativeOperand.of(b, b_scales, b_global, b_layout, b.shape[:1], k)
    token_scales, _, stride_r, stride_c, scale_groups = tokens.scales_pointer()
    programs = (triton.cdiv(total, tile.block_c) + groups) * triton.cdiv(n, tile.block_r)
    native_grouped_mm_kernel[(programs,)](
        experts.codes_descriptor(tile.block_r, tile.block_k, k), experts.scales_descriptor(tile.block_r, tile.block_k),
        tokens.codes_descriptor(tile.block_c, tile.block_k, k), token_scales, experts.global_scale, tokens.global_scale, offs, out,
        n, total, groups, triton.cdiv(k, tile.block_k), scale_groups, offs.stride(0), stride_r, stride_c,
        *((0, 0) if experts.global_scale is None else experts.global_scale.stride()),
        0 if tokens.global_scale is None else tokens.global_scale.stride(1),
        COLUMN_SCALES=str(tokens.layout), EACH_ROW=is_vector(experts.global_scale), EACH_COLUMN=is_vector(tokens.global_scale),
        BLOCK_G=1 << groups.bit_length(), **tile.grouped_options(), BLOCK=tokens.block,
    )  # fmt: skip
    return out


def grouped_tile(architecture: Architecture, mean: int) -> NativeTile:
    """The narrowest tile with as many columns as a group has tokens in the mean; the widest where none has."""
    tiles = sorted((tile for tile in architecture.tiles if tile.swapped), key=lambda tile: tile.block_c)
    return next((tile for tile in tiles if tile.block_c >= mean), tiles[-1])

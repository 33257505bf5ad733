"""Host side of the sm_90 products of `hopper_mm`: tiles, splits of k, descriptors, launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp4compile.codegen.formats import round_up
from fp4compile.codegen.kernels.hopper_mm import hopper_mm_kernel
from fp4compile.codegen.kernels.scaled_grouped_mm import group_tiles_kernel
from fp4compile.codegen.kernels.sum_splits import sum_splits_kernel

_STEP: Final = 64
_HALF_TILES: Final = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
_CODE_TILES: Final = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
_SCALE_TILES: Final = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


@dataclass(frozen=True, kw_only=True)
class HopperTile:
    """`block_n` rows of the weight by `block_m` rows of x: stages of shared memory, warps that multiply and warps that decode.

    `registers` of each decoding thread, of `most_registers` a thread on average, which decodes a chunk in `parts`; k goes in `splits`.
    """

    block_n: int
    block_m: int
    x_stages: int
    code_stages: int
    warps: int
    decode_warps: int
    registers: int
    parts: int = 1
    most_registers: int | None = None
    w_stages: int = 2
    splits: int = 1

    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_N": self.block_n, "BLOCK_M": self.block_m, "X_STAGES": self.x_stages, "W_STAGES": self.w_stages,
            "CODE_STAGES": self.code_stages, "DECODE_WARPS": self.decode_warps, "DECODE_REGISTERS": self.registers, "PARTS": self.parts,
            "BAND": max(1, 2048 // self.block_m), "num_warps": self.warps, "maxnreg": self.most_registers, "enable_fp_fusion": False,
        }  # fmt: skip


# The stages that fit into shared memory, and registers that neither kind of warp spills. `_SHORT_NARROW` fits twice.
_SHORT_NARROW: Final = HopperTile(
    block_m=64, block_n=128, x_stages=3, code_stages=2, warps=4, decode_warps=4, registers=112, most_registers=128
)  # fmt: skip
_SHORT: Final = HopperTile(block_m=64, block_n=256, x_stages=4, code_stages=2, warps=4, decode_warps=8, registers=160)
_TALL: Final = HopperTile(block_m=128, block_n=256, x_stages=3, code_stages=2, warps=8, decode_warps=4, registers=128, parts=2)
_LARGE: Final = HopperTile(block_m=256, block_n=128, x_stages=4, code_stages=2, warps=8, decode_warps=4, registers=128)
_MIDDLE: Final = HopperTile(block_m=128, block_n=128, x_stages=4, code_stages=4, warps=8, decode_warps=4, registers=128)
TILES: Final = (_SHORT_NARROW, _SHORT, _MIDDLE, _TALL, _LARGE)


def multiply_hopper(
    x: Tensor, codes: Tensor, scales: Tensor, a_global: Tensor | None, b_global: Tensor | None, bias: Tensor | None, out: Tensor,
    tile: HopperTile,
) -> None:  # fmt: skip
    """out (M, N) contiguous = x (M, K), bfloat16 or float16, times an NVFP4 weight transposed, times the global scales, plus bias (N).

    Codes (T, C, 1024) and scales (T, C, 128) are tiled and contiguous. A global scale is a number, or one a row of x or of the weight.
    """
    m, n = out.shape
    chunks = codes.shape[1]
    a_split = -(-chunks // tile.splits)
    splits = -(-chunks // a_split)
    last = (a_global, b_global, bias)
    strides = (_stride(a_global), _stride(b_global))
    partial = out if splits == 1 else out.new_empty((splits, m, n), dtype=torch.float32)
    hopper_mm_kernel[(-(-m // tile.block_m) * -(-n // tile.block_n), splits)](
        *_descriptors(x, codes, scales, tile), *(last if splits == 1 else (None, None, None)), None, partial,
        m, n, chunks, a_split, 0, strides[0], 0, strides[1], m * n, FP16=x.dtype is torch.float16, **tile.options(),
    )  # fmt: skip
    if splits > 1:
        sum_splits_kernel[(-(-m * n // 1024),)](
            partial, *last, out, n, m * n, *strides, SPLITS=splits, BLOCK=1024, num_warps=4, enable_fp_fusion=False
        )


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
    hopper_mm_kernel[(row_tiles * -(-n // tile.block_n), 1)](
        *_descriptors(x, codes.flatten(0, 1), scales.flatten(0, 1), tile), a_global, b_global, None, described, out,
        row_tiles, n, chunks, chunks, tiles, _stride(a_global), n if per_row else 1, 1 if per_row else 0, 0,
        FP16=x.dtype is torch.float16, **tile.options(),
    )  # fmt: skip


def choose_hopper_tile(m: int, n: int, padded_k: int, processors: int) -> HopperTile:
    """The tile for `m` rows of x: what is decoded once should meet many, and splits of k where tiles are too few for `processors`."""
    many = n >= 100 * processors
    if m <= 64:
        tile = _SHORT if many else _SHORT_NARROW
    else:
        tile = _LARGE if m > 128 else _TALL if many else _MIDDLE
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    splits = 1
    while 2 * tiles * splits <= processors and padded_k // (2 * splits) >= 512:
        splits *= 2
    return replace(tile, splits=splits)


def _descriptors(x: Tensor, codes: Tensor, scales: Tensor, tile: HopperTile) -> tuple[Any, Any, Any]:
    tiles, chunks, _ = codes.shape
    height = tile.block_n // 16
    codes_desc = TensorDescriptor(codes.view(torch.int32), [tiles, 8 * chunks, 32], [256 * chunks, 32, 1], [height, 8, 32], _CODE_TILES)
    scales_desc = TensorDescriptor(scales.view(torch.int32), [tiles, chunks, 32], [32 * chunks, 32, 1], [height, 1, 32], _SCALE_TILES)
    return _descriptor(x, tile.block_m), codes_desc, scales_desc


def _stride(global_scale: Tensor | None) -> int:
    return 0 if global_scale is None or global_scale.numel() == 1 else global_scale.stride(0)


def _descriptor(x: Tensor, block_m: int) -> TensorDescriptor:
    """Tiles of `x` (M, K); a copy where its rows do not begin at multiples of 16 bytes, as TMA wants them."""
    rows, k = x.shape
    stride = x.stride(0) if rows > 1 else round_up(k, 8)
    if x.stride(1) != 1 or stride % 8 or stride < k or x.data_ptr() % 16:
        stride = round_up(k, 8)
        copy = x.new_empty((rows, stride))
        copy[:, :k] = x
        x = copy
    return TensorDescriptor(x, [rows, k], [stride, 1], [block_m, _STEP], _HALF_TILES)

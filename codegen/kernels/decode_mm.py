"""Host side of the weight-only products for few rows of x: what they support, which kernel and tile a shape gets, launches.

The NVFP4 weight is plain, codes (N, Kp/2) and scales (N, Kp/16), or tiled by `tile_weight`, which costs the same bytes and reads faster:
a warp then loads 512 consecutive bytes where the plain layout gives it 64 of each of 8 rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.formats import round_up
from fp4compile.codegen.kernels.narrow_decode_mm import narrow_decode_mm_kernel
from fp4compile.codegen.kernels.wide_decode_mm import pair_columns_kernel, wide_decode_mm_kernel

MOST_ROWS: Final = 128
_HALVES: Final = (torch.bfloat16, torch.float16)


def supports(m: int, n: int, k: int, dtype: torch.dtype, capability: int) -> str | None:
    """None, or why `decode_mm` does not serve x (`m`, `k`) of `dtype` on a CUDA device of `capability` (10 * major + minor)."""
    if not 80 <= capability < 100:
        return f"the decode kernels are written for sm_80 to sm_90, this device is sm_{capability}"
    if dtype not in (*_HALVES, torch.float32):
        return f"x is {dtype}, the decode kernels take bfloat16, float16 and float32"
    rows = 3 * m if dtype is torch.float32 else m
    if rows > MOST_ROWS:
        return f"M={m} in {dtype} is more than the decode kernels are made for ({MOST_ROWS} rows of 16 bits, float32 counts three times)"
    if rows > 8 and capability not in (80, 90):
        return f"more than 8 rows need more shared memory than sm_{capability} has"
    if n < 1 or k < 1:
        return f"the product {m}x{n}x{k} is empty"
    return None


@dataclass(frozen=True, kw_only=True)
class NarrowTile:
    """A choice for `narrow_decode_mm_kernel`, for the meaning of which see there."""

    steps: int = 1
    row_tiles: int = 1
    column_tiles: int = 1
    warps_r: int = 1
    warps_k: int = 4
    unroll: int = 1

    def options(self, padded_k: int) -> dict[str, Any]:
        return {
            "STEPS": self.steps, "ROW_TILES": self.row_tiles, "COLUMN_TILES": self.column_tiles, "WARPS_R": self.warps_r,
            "WARPS_K": self.warps_k, "UNROLL": self.unroll, "MASKED": padded_k % (128 * self.steps * self.warps_k) != 0,
            "num_warps": self.warps_r * self.warps_k, "num_stages": 1, "enable_fp_fusion": False,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WideTile:
    """A choice for `wide_decode_mm_kernel`, for the meaning of which see there."""

    block_n: int
    block_m: int
    chunks: int
    stages: int
    warps: int

    def options(self, padded_k: int) -> dict[str, Any]:
        return {
            "BLOCK_N": self.block_n, "BLOCK_M": self.block_m, "CHUNKS": self.chunks, "STAGES": self.stages,
            "MASKED": padded_k % (128 * self.chunks) != 0, "num_warps": self.warps, "enable_fp_fusion": False,
        }  # fmt: skip


def tile_weight(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (T, C, 1024) uint8 and scales (T, C, 128) float8_e4m3fn of T tiles of 16 rows and C chunks of 128 columns, zero-padded.

    Byte 512 h + 64 g + 16 t + i of a tile's codes is byte 16 t + i of the chunk in row 8 h + g; byte 16 g + 4 t + 2 h + i of its scales is
    byte 2 t + i. `codes` is (N, Kp/2) uint8 and `scales` (N, Kp/16) float8_e4m3fn.
    """
    (n, half_k), bytes_ = codes.shape, scales.view(torch.uint8)
    more_rows, chunks = round_up(n, 16) - n, round_up(half_k, 64) // 64
    codes = F.pad(codes, (0, 64 * chunks - half_k, 0, more_rows))
    bytes_ = F.pad(bytes_, (0, 8 * chunks - bytes_.shape[1], 0, more_rows))
    codes = codes.view(-1, 2, 8, chunks, 64).permute(0, 3, 1, 2, 4).reshape(-1, chunks, 1024)
    bytes_ = bytes_.view(-1, 2, 8, chunks, 4, 2).permute(0, 3, 2, 4, 1, 5).reshape(-1, chunks, 128)
    return codes, bytes_.view(torch.float8_e4m3fn)


def decode_mm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    b_global: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    n: int | None = None,
    weight_is_old: bool = False,
    tile: NarrowTile | WideTile | None = None,
) -> Tensor:
    """(M, N): x (M, K) times the weight transposed, times `b_global` (float32, () or (N)), plus `bias` (N); float32 sums, one rounding.

    Products are exact and summed in a fixed order. The weight is plain, or tiled with `n` rows. `weight_is_old` promises that no launch
    still under way writes it, so that its first words may be loaded before that launch ends. Raises `UnsupportedDtype`.
    """
    if x.dtype not in (*_HALVES, torch.float32):
        raise UnsupportedDtype(where="decode_mm", found=x.dtype, fmt="a matrix product")
    tiled = codes.ndim == 3
    rows = n if n is not None else 16 * codes.shape[0] if tiled else codes.shape[0]
    if not tiled and codes.shape[1] % 16:
        codes, scales, tiled = *tile_weight(codes, scales), True  # a copy, for no row of it is aligned to what a lane loads
    weight = _Weight(codes=codes.contiguous(), scales=scales.contiguous(), rows=rows, tiled=tiled)
    launch = functools.partial(_launch, weight=weight, tile=tile, early=weight_is_old)
    if x.dtype is not torch.float32:
        return launch(x, b_global, bias, out_dtype)
    partial = launch(_three_terms(x), None, None, torch.float32)
    total = partial.view(3, *x.shape[:-1], rows).sum(0)
    total = total if b_global is None else total * b_global
    return (total if bias is None else total + bias.float()).to(out_dtype)


@dataclass(frozen=True, kw_only=True)
class _Weight:
    codes: Tensor
    scales: Tensor
    rows: int
    tiled: bool

    @property
    def padded_k(self) -> int:
        return self.codes.shape[1] * (128 if self.tiled else 2)


def _three_terms(x: Tensor) -> Tensor:
    """(3 M, K) bfloat16 whose three M sum to float32 `x`; what is not finite stands in the first alone."""
    terms, rest = [], x
    for _ in range(3):
        term = rest.bfloat16()
        terms.append(term)
        rest = torch.where(term.isfinite(), rest - term.float(), 0.0)
    return torch.cat(terms)


def _launch(
    x: Tensor, b_global: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    *, weight: _Weight, tile: NarrowTile | WideTile | None, early: bool,
) -> Tensor:  # fmt: skip
    m, n, padded_k = x.shape[0], weight.rows, weight.padded_k
    out = x.new_empty((m, n), dtype=out_dtype)
    tile = tile or choose_tile(m, n, padded_k, weight.tiled)
    global_stride = 1 if b_global is not None and b_global.ndim == 1 else 0
    common = {"TILED": weight.tiled, "FP16": x.dtype is torch.float16, "PDL": early, "PTX": x.is_cuda, **tile.options(padded_k)}
    pdl = {"launch_pdl": True} if early else {}
    with torch.cuda.device_of(x):
        if isinstance(tile, NarrowTile):
            if x.shape[1] != padded_k or not x.is_contiguous():
                x = F.pad(x, (0, padded_k - x.shape[1])).contiguous()
            grid = (-(-n // (16 * tile.row_tiles * tile.warps_r)), -(-m // (8 * tile.column_tiles)))
            narrow_decode_mm_kernel[grid](
                x.view(torch.uint8), weight.codes, weight.scales.view(torch.uint8), b_global, bias, out, m, n, padded_k, global_stride,
                **common, **pdl,
            )  # fmt: skip
            return out
        turn = 128 * tile.chunks
        paired = x.new_empty((m, round_up(padded_k, turn)))
        pair_columns_kernel[(m, -(-paired.shape[1] // 1024))](
            x, paired, x.shape[1], *x.stride(), paired.shape[1], PDL=early, num_warps=4, **pdl
        )
        codes, scales = weight.codes.view(torch.int32), weight.scales.view(torch.int32 if weight.tiled else torch.int16)
        grid = (-(-n // tile.block_n), -(-m // tile.block_m))
        wide_decode_mm_kernel[grid](
            paired, codes, scales, b_global, bias, out, m, n, padded_k, codes.stride(0), scales.stride(0), paired.shape[1], global_stride,
            **common, **pdl,
        )  # fmt: skip
    return out


def choose_tile(m: int, n: int, padded_k: int, tiled: bool) -> NarrowTile | WideTile:
    """Kernel and tile for `m` rows of x and `n` of the weight: enough warps for 132 multiprocessors, then as few loads of x as that leaves.

    The cuts are those of a sweep over 28672x8192, 14336x4096 and 4096x4096 on an H100 80GB HBM3 (2026-11-22, plain layout, Triton 3.6).
    """
    few, many = n <= 8192, n >= 20480
    long = padded_k >= 1024  # else half of eight warps would find no k
    if m <= 8 or (m <= 16 and few):
        columns = 1 if m <= 8 else 2
        if few:
            return NarrowTile(steps=2 if m == 1 and long else 1, column_tiles=columns, warps_k=8 if long else 4)
        if m > 1:
            return NarrowTile(row_tiles=1 if many and m <= 4 else 2, warps_r=2 if many else 1, warps_k=2 if many else 4)
        return NarrowTile(row_tiles=2 if tiled else 1, warps_k=4)
    if m <= 32:
        block_m = 16 if m <= 16 else 32
        if few or (m <= 16 and not many):
            return WideTile(block_n=64, block_m=block_m, chunks=2, stages=4, warps=4)
        return WideTile(block_n=128, block_m=block_m, chunks=2, stages=3, warps=4 if many else 8)
    if few:
        return WideTile(block_n=64, block_m=64, chunks=1, stages=4, warps=4)
    if m <= 64:
        return WideTile(block_n=128, block_m=64, chunks=1 if many else 2, stages=3, warps=8)
    return WideTile(block_n=128, block_m=128, chunks=1, stages=3, warps=8)

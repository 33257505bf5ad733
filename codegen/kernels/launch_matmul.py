"""Host side of the block-scaled products: how operands are seen, in which dtype they meet, which tile computes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
import triton.language as tl
from torch import Tensor

from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.kernels.half_mm import half_mm_kernel
from fp4compile.codegen.kernels.hopper_tiles import HALF_TILES, gluon_launcher
from fp4compile.codegen.kernels.launch_dequantize import dequantize
from fp4compile.codegen.kernels.scaled_grouped_mm import scaled_grouped_mm_kernel
from fp4compile.codegen.kernels.scaled_mm import scaled_mm_kernel

# NVINT4 is MixFP4 with every block flagged.
_FORMAT_OF_SCALES: Final = {torch.float8_e4m3fn: "nvfp4", torch.float8_e8m0fnu: "mxfp4", torch.uint8: "mixfp4", torch.int8: "if4"}
_SCALES_OF_FORMAT: Final = {name: dtype for dtype, name in _FORMAT_OF_SCALES.items()}
_DTYPES: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One side of a product: `data` (batch, R, K) or packed (batch, R, Kp/2), `scales` as bytes, `global_scale` (batch, R)."""

    data: Tensor
    scales: Tensor | None
    global_scale: Tensor | None
    format: str  # "none": high precision

    @classmethod
    def of(cls, x: Tensor, scales: Tensor | None, global_scale: Tensor | None, batch: torch.Size, where: str) -> Operand:
        """`x` (..., R, C), expanded to `batch`. `global_scale` holds one number a matrix, or one a row. Raises `UnsupportedDtype`."""
        if scales is None and x.dtype not in _DTYPES:
            raise UnsupportedDtype(where=where, found=x.dtype, fmt="a matrix product")
        if global_scale is not None and global_scale.ndim != x.ndim - 1:
            global_scale = global_scale[..., None]
        return cls(
            data=_flat(x, batch, 2),
            scales=None if scales is None else _flat(scales.view(torch.uint8), batch, 2),
            global_scale=None if global_scale is None else _flat(global_scale.expand(*global_scale.shape[:-1], x.shape[-2]), batch, 1),
            format="none" if scales is None else _FORMAT_OF_SCALES[scales.dtype],
        )

    def dequantized(self, k: int, dtype: torch.dtype) -> Operand:
        """Itself where it is not quantized, else its values in `dtype`, in which they are exact; the global scale is left."""
        if self.scales is None:
            return self
        shared = self.data.stride(0) == 0 and self.scales.stride(0) == 0  # one matrix for all of the batch
        data, scales = (self.data[:1], self.scales[:1]) if shared else (self.data, self.scales)
        values = dequantize(data, scales.view(_SCALES_OF_FORMAT[self.format]), k, dtype)
        return replace(self, data=values.expand(self.data.shape[0], -1, -1), scales=None, format="none")

    def strides(self) -> tuple[int, ...]:
        """Strides of data (batch, row, k), scales (batch, row, block) and global scale (batch, row)."""
        scales = (0, 0, 0) if self.scales is None else self.scales.stride()
        global_scale = (0, 0) if self.global_scale is None else self.global_scale.stride()
        return (*self.data.stride(), *scales, *global_scale)


@dataclass(frozen=True, kw_only=True)
class MatmulTile:
    """Tile sizes and launch options. Chosen to compile without spills on cc 80 to 120, not yet tuned."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch. Without FMA, for the epilogue multiplies and adds in two roundings."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False,
        }  # fmt: skip


_FEW_ROWS: Final = MatmulTile(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=3)
_SOME_ROWS: Final = MatmulTile(block_m=64, block_n=64, block_k=64, num_warps=8, num_stages=3)
_MANY_ROWS: Final = MatmulTile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
_FLOAT32_FEW_ROWS: Final = MatmulTile(block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=2)
_FLOAT32: Final = MatmulTile(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=2)


# Both operands in shared memory: 144, 96 and 48 KiB.
_MANY_ROWS_HOPPER: Final = 256  # from which on the kernel of `launch_half_hopper` has tiles for all multiprocessors
_HALVES_HOPPER: Final = MatmulTile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3)
_HALVES_AMPERE: Final = MatmulTile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
_HALVES_SMALL: Final = MatmulTile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3)


def multiply(a: Operand, b: Operand, bias: Tensor | None, out: Tensor, k: int, capability: int) -> None:
    """`out` (batch, M, N) contiguous = A times B transposed, scaled, plus `bias` (batch, M, N)."""
    batch, m, n = out.shape
    dtype, precision = _meeting_dtype(a, b)
    if m > 64 and dtype is not torch.float32 and 80 <= capability < 100 and {a.format, b.format} <= {"none", "nvfp4", "mxfp4"}:
        _multiply_halves(a.dequantized(k, dtype), b.dequantized(k, dtype), bias, out, k, capability)
        return
    tile = _tile(m, dtype)
    programs = batch * -(-m // tile.block_m) * -(-n // tile.block_n)
    scaled_mm_kernel[(programs,)](
        a.data, a.scales, a.global_scale, b.data, b.scales, b.global_scale, bias, out, m, n, k,
        *a.strides(), *b.strides(), *((0, 0, 0) if bias is None else bias.stride()),
        A_FORMAT=a.format, B_FORMAT=b.format, DTYPE=_DTYPES[dtype], PRECISION=precision,
        B_FIRST=_b_first(a, b, dtype, tile), **tile.options(),
    )  # fmt: skip


def _multiply_halves(a: Operand, b: Operand, bias: Tensor | None, out: Tensor, k: int, capability: int) -> None:
    """The same where both operands are halves. Dequantizing reads and writes them once; a product reads them for every tile."""
    batch, m, n = out.shape
    if capability == 90 and batch == 1 and m >= _MANY_ROWS_HOPPER and (bias is None or bias.stride(1) == 0):
        vector = None if bias is None else bias[0, 0].contiguous()
        scales = [None if operand.global_scale is None else operand.global_scale[0] for operand in (a, b)]
        gluon_launcher("launch_half_hopper").multiply_halves_hopper(a.data[0], b.data[0], *scales, vector, out[0], HALF_TILES[0])
        return
    tile = _HALVES_HOPPER if capability == 90 else _HALVES_AMPERE if capability == 80 else _HALVES_SMALL
    half_mm_kernel[(batch * -(-m // tile.block_m) * -(-n // tile.block_n),)](
        a.data, a.global_scale, b.data, b.global_scale, bias, out, m, n, k,
        *_without_scales(a.strides()), *_without_scales(b.strides()), *((0, 0, 0) if bias is None else bias.stride()),
        MASKED=k % tile.block_k != 0, **tile.options(),
    )  # fmt: skip


def _without_scales(strides: tuple[int, ...]) -> tuple[int, ...]:
    return *strides[:3], *strides[6:]


def multiply_grouped(a: Operand, b: Operand, offs: Tensor, out: Tensor, k: int) -> None:
    """`out` (T, N) contiguous = rows of A (1, T, K) times the matrix of B (G, N, K) that `offs` (G) assigns to them."""
    total, n = out.shape
    groups = b.data.shape[0]
    dtype, precision = _meeting_dtype(a, b)
    tile = _tile(-(-total // max(groups, 1)), dtype)
    programs = (-(-total // tile.block_m) + groups) * -(-n // tile.block_n)
    scaled_grouped_mm_kernel[(programs,)](
        a.data, a.scales, a.global_scale, b.data, b.scales, b.global_scale, offs, out, total, groups, n, k,
        *(s for i, s in enumerate(a.strides()) if i not in (0, 3, 6)), *b.strides(), offs.stride(0),
        A_FORMAT=a.format, B_FORMAT=b.format, DTYPE=_DTYPES[dtype], PRECISION=precision,
        B_FIRST=_b_first(a, b, dtype, tile), BLOCK_G=1 << groups.bit_length(), **tile.options(),
    )  # fmt: skip


def _flat(x: Tensor, batch: torch.Size, kept: int) -> Tensor:
    """`x` with its leading dimensions expanded to `batch` and made one; a copy only where strides cannot say it."""
    inner = x.shape[x.ndim - kept :]
    return x.expand(*batch, *inner).reshape(batch.numel(), *inner)


def _meeting_dtype(a: Operand, b: Operand) -> tuple[torch.dtype, str]:
    """The dtype both operands are exact in, and the precision of the dot.

    float16 cannot hold MXFP4's range, bfloat16 not IF4's 9 bits; TF32 holds both: 10 mantissa bits and the exponents of float32. Only MXFP4
    values below 2^-126 may be flushed there. float32 operands are multiplied as float32.
    """
    given = {operand.data.dtype for operand in (a, b) if operand.format == "none"}
    if given <= {torch.bfloat16}:
        return (torch.float32, "tf32") if "if4" in (a.format, b.format) else (torch.bfloat16, "ieee")
    if given == {torch.float16}:
        return (torch.float32, "tf32") if "mxfp4" in (a.format, b.format) else (torch.float16, "ieee")
    return torch.float32, "ieee"


def _tile(m: int, dtype: torch.dtype) -> MatmulTile:
    if dtype is torch.float32:
        return _FLOAT32_FEW_ROWS if m <= 16 else _FLOAT32
    return _FEW_ROWS if m <= 16 else _SOME_ROWS if m <= 64 else _MANY_ROWS


def _b_first(a: Operand, b: Operand, dtype: torch.dtype, tile: MatmulTile) -> bool:
    """Whether B must be the left operand of the dot: where A is decoded and B a plain load, on tiles that Hopper multiplies with wgmma.

    A decoded left operand stays in registers. Where nothing else keeps the loop from it, Triton leaves such a wgmma in flight over the
    next iteration, and ptxas before CUDA 13.3 writes its registers again meanwhile (https://github.com/triton-lang/triton/issues/9433):
    MXFP4 x bfloat16, 1024x2048x4096, came out wrong in a quarter of all runs on an H100 with Triton 3.6, in 8 rows of a tile. A decoded
    right operand goes through shared memory, and the product is waited for. Microseconds before and after there, NVFP4 x bfloat16,
    Mx4096x4096: 97 and 83 (M = 64), 179 and 186 (256), 341 and 261 (1024), 1309 and 1005 (4096).
    """
    return a.format != "none" and b.format == "none" and dtype is not torch.float32 and tile.block_m >= 64

"""Host side of the products of half-precision rows and one NVFP4 weight: which kernel and tile a shape gets, launches.

On sm_80 and sm_90 rows are as many as one likes; elsewhere, Blackwell included, only what needs no shared memory is served: a few rows.

The weight is plain, codes (N, Kp/2) and scales (N, Kp/16), or tiled, which costs the same bytes and reads faster: a warp then loads 512
consecutive bytes where the plain layout gives it 64 of each of 8 rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4compile.codegen import tuning
from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.formats import Layout, round_up
from fp4compile.codegen.kernels.hopper_tiles import HALF_TILES, HalfTile, HopperTile, RegisterTile, choose_register_tile, gluon_launcher
from fp4compile.codegen.kernels.kernel_call import KernelCall, kinds_of, on_device
from fp4compile.codegen.kernels.launch_dequantize import dequantize, dequantize_tiled, tile_on_device
from fp4compile.codegen.kernels.narrow_decode_mm import narrow_decode_mm_kernel
from fp4compile.codegen.kernels.wide_decode_mm import pair_columns_kernel, wide_decode_mm_kernel
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.target import known_target, processors_of
from fp4compile.codegen.tuning import TuningKey

_MOST_ROWS: Final = 128  # of the wide kernel
_MOST_TERMS: Final = 384  # rows that float32 rows may become; past that, float32 arithmetic itself costs no more
_HALVES: Final = (torch.bfloat16, torch.float16)
# Rows of x on sm_90 from which a weight that would have to be tiled first is dequantized once, into memory, unless the output is so small
# that only splits of k fill the GPU.
_PLAIN_DEQUANTIZED_FROM: Final = 256


def supports(m: int, n: int, k: int, dtype: torch.dtype, capability: int) -> str | None:
    """None, or why `decode_mm` does not serve x (`m`, `k`) of `dtype` on a CUDA device of `capability` (10 * major + minor)."""
    if capability < 80:
        return f"the decode kernels are written for sm_80 and later, this device is sm_{capability}"
    if dtype not in (*_HALVES, torch.float32):
        return f"x is {dtype}, the decode kernels take bfloat16, float16 and float32"
    rows = 3 * m if dtype is torch.float32 else m
    most = _MOST_TERMS if capability == 90 and dtype is torch.float32 else None if capability == 90 else _MOST_ROWS
    if most is not None and rows > most:
        return f"M={m} in {dtype} is more than the decode kernels are made for ({most} rows of 16 bits, float32 counts three times)"
    if rows > 8 and capability not in (80, 90):
        return f"more than 8 rows need more shared memory than sm_{capability} has, or another kernel"
    if m < 1 or n < 1 or k < 1:
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


_ONE_ROW: Final = NarrowTile(row_tiles=2, warps_r=2, warps_k=2)


def tile_weight(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A plain weight in the tiled layout, on any device."""
    return lay_out_ref(codes, scales, Layout.TILED)


DecodeTile = NarrowTile | WideTile | RegisterTile | HopperTile | HalfTile
KINDS: Final = (NarrowTile, WideTile, RegisterTile, HopperTile, HalfTile)


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What follows the sum: times the product of the global scales, plus the bias. A scale is float32, a number or one a row."""

    a_global: Tensor | None = None
    b_global: Tensor | None = None
    bias: Tensor | None = None  # (N)

    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.a_global, self.b_global, self.bias

    def strides(self) -> tuple[int, int]:
        return _stride(self.a_global), _stride(self.b_global)


def _stride(scale: Tensor | None) -> int:
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)


def decode_mm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    b_global: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    n: int | None = None,
    a_global: Tensor | None = None,
    weight_is_old: bool = False,
    tile: DecodeTile | None = None,
) -> Tensor:
    """(M, N): x (M, K) times the weight transposed, times `a_global` (float32, () or (M)) and `b_global` (() or (N)), plus `bias` (N).

    Products are exact and summed in float32 in a fixed order; one rounding. The weight is plain, or tiled with `n` rows. `weight_is_old`
    promises that no launch still under way writes it, so that its first words may be loaded before that launch ends. Raises
    `UnsupportedDtype`.
    """
    if x.dtype not in (*_HALVES, torch.float32):
        raise UnsupportedDtype(where="decode_mm", found=x.dtype, fmt="a matrix product")
    tiled = codes.ndim == 3
    rows = n if n is not None else 16 * codes.shape[0] if tiled else codes.shape[0]
    epilogue = Epilogue(a_global=a_global, b_global=b_global, bias=bias)
    if x.dtype is not torch.float32:
        return _launch(x, codes, scales, epilogue, rows, out_dtype, tile, weight_is_old)
    partial = _launch(_three_terms(x), codes, scales, Epilogue(), rows, torch.float32, tile, weight_is_old)
    total = partial.view(3, *x.shape[:-1], rows).sum(0)
    if a_global is not None:
        scale = a_global[..., None] if b_global is None else a_global[..., None] * b_global
        total = total * scale
    elif b_global is not None:
        total = total * b_global
    return (total if bias is None else total + bias.float()).to(out_dtype)


def _three_terms(x: Tensor) -> Tensor:
    """(3 M, K) bfloat16 whose three M sum to float32 `x`; what is not finite stands in the first alone."""
    terms, rest = [], x
    for _ in range(3):
        term = rest.bfloat16()
        terms.append(term)
        rest = torch.where(term.isfinite(), rest - term.float(), 0.0)
    return torch.cat(terms)


def _launch(
    x: Tensor, codes: Tensor, scales: Tensor, epilogue: Epilogue, n: int, out_dtype: torch.dtype, tile: DecodeTile | None, early: bool
) -> Tensor:  # fmt: skip
    tiled = codes.ndim == 3
    padded_k = codes.shape[1] * (128 if tiled else 2)
    if tile is None:
        tile = _tile_for(x, n, padded_k, tiled)
    out = x.new_empty((x.shape[0], n), dtype=out_dtype)
    if isinstance(tile, HalfTile):
        with on_device(x):
            values = dequantize_tiled(codes, scales, n, x.dtype) if tiled else dequantize(codes, scales, x.shape[1], x.dtype)
            gluon_launcher("launch_half_hopper").multiply_halves_hopper(x, values, *epilogue.arguments(), out, tile)
        return out
    if not tiled and (isinstance(tile, (HopperTile, RegisterTile)) or codes.shape[1] % 16):
        codes, scales = tile_on_device(codes, scales)  # a copy: TMA wants tiles, the others rows aligned to what a lane loads
        tiled, padded_k = True, codes.shape[1] * 128
    if not (codes.is_contiguous() and scales.is_contiguous()):
        codes, scales = codes.contiguous(), scales.contiguous()
    with on_device(x):
        if isinstance(tile, HopperTile):
            gluon_launcher("launch_hopper").multiply_hopper(x, codes, scales, *epilogue.arguments(), out, tile)
            return out
        if isinstance(tile, RegisterTile):
            gluon_launcher("launch_register").multiply_register(x, codes, scales, *epilogue.arguments(), out, tile)
            return out
        launch = _launch_narrow if isinstance(tile, NarrowTile) else _launch_wide
        launch(x, codes, scales, epilogue, out, padded_k, tile, early)  # type: ignore[arg-type]
    return out


def _options(tile: NarrowTile | WideTile, padded_k: int, tiled: bool, fp16: bool, early: bool, on_gpu: bool) -> dict[str, Any]:
    pdl = {"launch_pdl": True} if early else {}
    return tile.options(padded_k) | {"TILED": tiled, "FP16": fp16, "PDL": early, "PTX": on_gpu} | pdl


@functools.lru_cache(maxsize=4096)
def _narrow_call(
    tile: NarrowTile, m: int, n: int, padded_k: int, strides: tuple[int, int], tiled: bool, fp16: bool, early: bool, device: torch.device,
    kinds: tuple[object, ...],
) -> KernelCall:  # fmt: skip
    """The kernel on tensors of `kinds`: x, codes, scales, both global scales, bias, out."""
    return KernelCall(
        narrow_decode_mm_kernel, (-(-n // (16 * tile.row_tiles * tile.warps_r)), -(-m // (8 * tile.column_tiles))),
        _options(tile, padded_k, tiled, fp16, early, device.type == "cuda"),
        m=m, n=n, padded_k=padded_k, a_global_stride=strides[0], b_global_stride=strides[1],
    )  # fmt: skip


def _launch_narrow(
    x: Tensor, codes: Tensor, scales: Tensor, epilogue: Epilogue, out: Tensor, padded_k: int, tile: NarrowTile, early: bool
) -> None:
    m, n = out.shape
    if x.shape[1] != padded_k or not x.is_contiguous():
        x = F.pad(x, (0, padded_k - x.shape[1])).contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    tensors = (x.view(torch.uint8), codes, scales.view(torch.uint8), *epilogue.arguments(), out)
    kinds, fp16 = kinds_of(*tensors), x.dtype is torch.float16
    _narrow_call(tile, m, n, padded_k, epilogue.strides(), codes.ndim == 3, fp16, early, x.device, kinds)(*tensors)


def _launch_wide(
    x: Tensor, codes: Tensor, scales: Tensor, epilogue: Epilogue, out: Tensor, padded_k: int, tile: WideTile, early: bool
) -> None:
    m, n = out.shape
    tiled, pdl = codes.ndim == 3, {"launch_pdl": True} if early else {}
    paired = x.new_empty((m, round_up(padded_k, 128 * tile.chunks)))
    pair_columns_kernel[(m, -(-paired.shape[1] // 1024))](
        x, paired, x.shape[1], *x.stride(), paired.shape[1], TILED=tiled, PDL=early, num_warps=4,
        enable_fp_fusion=False, **pdl,
    )  # fmt: skip
    words, scale_words = codes.view(torch.int32), scales.view(torch.int32 if tiled else torch.int16)
    wide_decode_mm_kernel[(-(-n // tile.block_n), -(-m // tile.block_m))](
        paired, words, scale_words, *epilogue.arguments(), out, m, n, padded_k, words.stride(0), scale_words.stride(0), paired.shape[1],
        *epilogue.strides(), **_options(tile, padded_k, tiled, x.dtype is torch.float16, early, x.is_cuda),
    )  # fmt: skip


@functools.lru_cache(maxsize=8192)  # a launch asks, and has few microseconds
def key_of(m: int, n: int, padded_k: int, dtype: torch.dtype, tiled: bool) -> TuningKey:
    """What a launch asks for before it chooses by itself."""
    layout = "tiled" if tiled else "plain"
    return TuningKey(family=f"decode_mm {str(dtype).removeprefix('torch.')} {layout}", m=m, n=n, k=padded_k)


def _tile_for(x: Tensor, n: int, padded_k: int, tiled: bool) -> DecodeTile:
    m = x.shape[0]
    if not x.is_cuda:
        return choose_tile(m, n, padded_k, tiled, 80)  # Triton's interpreter
    capability = known_target(x.device).capability
    found = tuning.lookup(x.device, key_of(m, n, padded_k, x.dtype, tiled), KINDS)
    if found is not None and not (capability == 90 and isinstance(found, WideTile)):
        return found
    return choose_tile(m, n, padded_k, tiled, capability, processors_of(x.device))


@functools.lru_cache(maxsize=8192)
def choose_tile(m: int, n: int, padded_k: int, tiled: bool, capability: int = 90, processors: int = 132) -> DecodeTile:
    """Kernel and tile for `m` rows of x and `n` of the weight: enough warps for all multiprocessors, then as few loads of x as that leaves.

    The cuts are those of sweeps over 28672x8192, 14336x4096 and 4096x4096 on an H100 80GB HBM3 (2026-11-22, Triton 3.6).
    """
    few, many = n <= 62 * processors, n >= 155 * processors
    if m <= 8 or (m <= 16 and few):
        return _choose_narrow(m, few, many, padded_k, tiled, capability >= 100)
    if capability == 90:
        tile = choose_register_tile(m, n, padded_k, processors)
        fills = tile.splits == 1 or 2 * HALF_TILES[0].count(m, n) > processors
        return HALF_TILES[0] if not tiled and m >= _PLAIN_DEQUANTIZED_FROM and fills else tile
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


def _choose_narrow(m: int, few: bool, many: bool, padded_k: int, tiled: bool, blackwell: bool) -> NarrowTile:
    """On Blackwell two steps spill, and so do eight warps along k."""
    long = padded_k >= 1024  # else half of eight warps would find no k
    columns = 1 if m <= 8 else 2
    if few and not blackwell:
        return NarrowTile(steps=2 if m == 1 and long else 1, column_tiles=columns, warps_k=8 if long else 4)
    if m > 8:
        return NarrowTile(row_tiles=2, column_tiles=2, warps_r=2 if many else 1, warps_k=2 if many else 4)
    if m > 1 and not tiled:
        return NarrowTile(row_tiles=1 if many and m <= 4 else 2, warps_r=2 if many else 1, warps_k=2 if many else 4)
    if m == 1 and many:
        return _ONE_ROW
    return NarrowTile(row_tiles=2 if tiled and many else 1, warps_k=4)

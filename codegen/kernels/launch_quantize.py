"""Host side of quantization: the CUDA implementations of `fp4::quantize` and `fp4::hadamard`. Results are contiguous.

Nothing here waits for the device. A decoder quantizes some two hundred small activations a token, so what depends on shapes alone is
planned once, few rows take one launch, and no buffer has to be zeroed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.formats import E2M1_MAX, GlobalScale, Layout, QuantConfig, Rounding, round_up
from fp4compile.codegen.kernels.quantize import amax_kernel, hadamard_kernel, quantize_here_kernel, quantize_kernel
from fp4compile.codegen.kernels.quantize_tiles import Tile, View, multiprocessors, power_of_two, tile_of
from fp4compile.codegen.reference.layout import laid_out_shapes, lay_out_ref
from fp4compile.codegen.target import target_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: Final = {"num_stages": 1, "enable_fp_fusion": False}  # FMA would change bits
_UNITS_IN_ONE_PROGRAM: Final = 2048  # 64 KiB of bfloat16: a whole matrix in the registers of 16 warps


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a quantization that its tensor's shape and strides decide."""

    config: QuantConfig
    view: View
    swizzled: bool
    padded_k: int
    capability: int  # 0 under the interpreter
    processors: int
    codes_shape: tuple[int, ...]
    scales_shape: tuple[int, ...]
    decode_shape: tuple[int, ...]

    @property
    def unit(self) -> int:
        return self.config.k_multiple

    @property
    def groups(self) -> int:
        return self.padded_k // self.config.fmt.block

    @property
    def span(self) -> tuple[int, int]:
        """(rows, groups) of the scales that are stored, padding included."""
        return (round_up(self.view.rows, 128), round_up(self.groups, 4)) if self.swizzled else (self.view.rows, self.groups)

    @functools.cached_property
    def extent(self) -> tuple[int, int]:
        """(rows, units) that tiles must cover."""
        rows, groups = self.span
        return rows, -(-groups * self.config.fmt.block // self.unit)

    @functools.cached_property
    def finds_amax_here(self) -> bool:
        """Whether the kernel that quantizes can find the maximum of its rows, or of a small matrix, by itself."""
        if not self.config.fmt.has_global_scale or self.config.global_scale is GlobalScale.STATIC:
            return False
        rows, units = self.extent
        return self.config.global_scale is GlobalScale.ROW or power_of_two(rows) * power_of_two(units) <= _UNITS_IN_ONE_PROGRAM

    @functools.cached_property
    def tile(self) -> Tile:
        rows, units = self.extent
        is_tile = self.config.is_tile
        if not self.finds_amax_here:
            return tile_of(self.view, self.unit, rows, units, is_tile=is_tile)
        if self.config.global_scale is GlobalScale.ROW:
            return _tile_of_rows(self.view, self.unit, rows, units)
        rows, units = max(power_of_two(rows), 16 if is_tile or self.view.across else 1), power_of_two(units)
        a, b = (units, rows) if self.view.across else (rows, units)
        return Tile(a=a, b=b, warps=min(16, max(4, a * b * self.unit // 2048)))

    def tiles(self, tile: Tile) -> tuple[int, int]:
        """How many of them along (rows, units)."""
        rows, units = self.extent
        a, b = (tile.b, tile.a) if self.view.across else (tile.a, tile.b)
        return -(-rows // a), -(-units // b)

    @functools.cached_property
    def reading(self) -> dict[str, Any]:
        """How the kernel loads, apart from its tile."""
        return {"ACCESS": self.view.access(self.unit), "ACROSS": self.view.across, "UNIT": self.unit, "HADAMARD": self.config.hadamard}

    @functools.cached_property
    def arithmetic(self) -> dict[str, Any]:
        config = self.config
        return {
            "BOUND": E2M1_MAX * config.scale_rule.e4m3_bound, "IS_TILE": config.is_tile, "SCALE_RULE": str(config.scale_rule),
            "STOCHASTIC": config.rounding is Rounding.STOCHASTIC, "SWIZZLED": self.swizzled, "CAPABILITY": self.capability,
        }  # fmt: skip

    @functools.cached_property
    def strides(self) -> tuple[int, int, int]:
        return self.view.strides(self.view.access(self.unit))


def _tile_of_rows(view: View, unit: int, rows: int, units: int) -> Tile:
    """Whole rows where they fit into the registers of 8 warps, else steps that a program takes along them."""
    if view.across:
        return tile_of(view, unit, rows, units, is_tile=False)
    whole = power_of_two(units)
    if whole * 4 <= units * 5 and whole * unit <= 32768:
        warps = 4 if whole * unit <= 4096 else 8
        return Tile(a=min(max(4096 // (whole * unit), 1), power_of_two(rows)), b=whole, warps=warps)
    return tile_of(view, unit, 1, units, is_tile=False)


@functools.lru_cache(maxsize=4096)
def plan_of(
    dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], aligned: bool, device: torch.device, batch_shape: torch.Size,
    axis: int, layout: str, *config: Any,
) -> Plan:  # fmt: skip
    """For a tensor of two or three dimensions. Raises `UnsupportedDtype` or `UnsupportedDevice`."""
    how = config_of(*config)
    check(dtype, device, "fp4::quantize", how.format)
    view = View.of(shape, strides, dtype.itemsize, aligned, axis)
    padded_k = round_up(view.k, how.k_multiple)
    codes, scales = laid_out_shapes(view.rows, padded_k // 2, padded_k // how.fmt.block, layout)
    per_row = (view.rows,) if how.global_scale is GlobalScale.ROW else ()
    return Plan(
        config=how, view=view, swizzled=layout == Layout.SWIZZLED, padded_k=padded_k,
        capability=known_target(device).capability, processors=multiprocessors(device),
        codes_shape=(*batch_shape, *codes), scales_shape=(*batch_shape, *scales), decode_shape=(*batch_shape, *per_row),
    )  # fmt: skip


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
    """`fp4::quantize`: see `reference.block.quantize_ref`, with which every bit agrees. Swizzled scales are written as such."""
    if layout == Layout.TILED:
        codes, scales, decode = quantize(x, axis, format, block, scale_rule, global_scale, rounding, hadamard, static_amax, seed)
        return *lay_out_ref(codes, scales, layout), decode
    batch_shape = x.shape[:-2]
    if x.ndim > 3:
        x = x.flatten(0, -3)
    plan = plan_of(
        x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0, x.device, batch_shape, axis, layout,
        format, block, scale_rule, global_scale, rounding, hadamard, static_amax,
    )  # fmt: skip
    if not x.numel():
        return _of_nothing(x, plan)
    codes, scales, decode = new_results(x, plan)
    with on_device_of(x):
        if plan.finds_amax_here:
            _quantize_here(x, plan, seed, codes, scales, decode)
        else:
            amax = amax_of(x, plan)[0] if needs_amax(plan) else None
            _quantize_known(x, plan, amax, seed, codes, scales, decode)
    return codes, scales, decode


def new_results(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty(plan.codes_shape, dtype=torch.uint8)
    scales = x.new_empty(plan.scales_shape, dtype=plan.config.fmt.scale_dtype)
    if not plan.config.fmt.has_global_scale:
        return codes, scales, x.new_ones(plan.decode_shape, dtype=torch.float32)
    return codes, scales, x.new_empty(plan.decode_shape, dtype=torch.float32)


def _of_nothing(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Of a tensor without elements: padding, and global scales as of zeros."""
    codes, scales, decode = new_results(x, plan)
    scales.view(torch.uint8).zero_()
    amax = plan.config.static_amax
    if amax is None:
        return codes, scales, decode.fill_(1.0)
    bound = decode.new_full((), E2M1_MAX * plan.config.scale_rule.e4m3_bound)
    return codes, scales, decode.copy_(1 / (bound / amax).clamp(max=torch.finfo(torch.float32).max))


def _quantize_here(x: Tensor, plan: Plan, seed: Tensor | None, codes: Tensor, scales: Tensor, decode: Tensor) -> None:
    view, tile = plan.view, plan.tile
    row_tiles, unit_tiles = plan.tiles(tile)
    quantize_here_kernel[(row_tiles, view.batch)](
        x, seed_of(plan, seed), codes, scales.view(torch.uint8), decode, view.rows, view.k, plan.groups, row_tiles, unit_tiles,
        *plan.span, *plan.strides,
        PER_ROW=plan.config.global_scale is GlobalScale.ROW, ONE_TILE=unit_tiles == 1, A=tile.a, B=tile.b, num_warps=tile.warps,
        **plan.arithmetic, **plan.reading, **OPTIONS,
    )  # fmt: skip


def _quantize_known(
    x: Tensor, plan: Plan, amax: Tensor | None, seed: Tensor | None, codes: Tensor, scales: Tensor, decode: Tensor
) -> None:  # fmt: skip
    view, tile = plan.view, plan.tile
    row_tiles, unit_tiles = plan.tiles(tile)
    tiles = view.batch * row_tiles * unit_tiles
    parts = 0 if amax is None else amax.shape[-1]
    quantize_kernel[(min(tiles, plan.processors * PROGRAMS_A_PROCESSOR),)](
        x, amax, seed_of(plan, seed), codes, scales.view(torch.uint8), decode, plan.config.static_amax or 0.0, parts,
        view.rows, view.k, plan.groups, row_tiles, unit_tiles, tiles, *plan.span, *plan.strides,
        FORMAT=plan.config.format, MOST_PARTS=power_of_two(parts), ONE_MATRIX=view.batch == 1, A=tile.a, B=tile.b, num_warps=tile.warps,
        **plan.arithmetic, **plan.reading, **OPTIONS,
    )  # fmt: skip


PROGRAMS_A_PROCESSOR: Final = 8


def seed_of(plan: Plan, seed: Tensor | None) -> Tensor | None:
    stochastic = plan.config.rounding is Rounding.STOCHASTIC
    assert seed is not None or not stochastic, "stochastic rounding draws from a seed"
    return seed if stochastic else None


def needs_amax(plan: Plan) -> bool:
    return plan.config.fmt.has_global_scale and plan.config.global_scale is GlobalScale.TENSOR


def amax_of(x: Tensor, plan: Plan, *, plain_too: bool = False) -> tuple[Tensor, Tensor | None]:
    """(batch, parts) float32 whose maxima are the matrices', rotated as `plan` says; with `plain_too` also those of `x` itself."""
    view, unit = plan.view, plan.unit
    tile = tile_of(view, unit, view.rows, -(-view.k // unit), is_tile=False, elements=8192)
    row_tiles, unit_tiles = plan.tiles(tile)
    parts = min(row_tiles * unit_tiles, max(1, plan.processors * 4 // view.batch))
    amax = x.new_empty((view.batch, parts), dtype=torch.float32)
    plain = torch.empty_like(amax) if plain_too else None
    amax_kernel[(parts, view.batch)](
        x, amax, plain, view.rows, view.k, row_tiles, unit_tiles, *plan.strides,
        A=tile.a, B=tile.b, num_warps=tile.warps, **plan.reading, **OPTIONS,
    )  # fmt: skip
    return amax, plain


def hadamard(x: Tensor, axis: int, size: int) -> Tensor:
    """`fp4::hadamard`: `x` with `axis` zero-padded to a multiple of `size` and rotated in groups of it."""
    check(x.dtype, x.device, "fp4::hadamard", "a rotated tensor")
    shape = list(x.shape)
    shape[axis] = padded_k = round_up(shape[axis], size)
    out = x.new_empty(shape)
    if not out.numel():
        return out
    data, moved = (t if axis == -1 else t.mT for t in (x, out))
    data = data.reshape(-1, *data.shape[-2:])
    batch, rows, k = data.shape
    block_k = 64 if data.stride(1) == 1 and data.stride(2) != 1 else 256
    block_k = max(block_k, size)
    block_r = max(16, 4096 // block_k)
    with on_device_of(x):
        hadamard_kernel[(batch * -(-rows // block_r) * -(-padded_k // block_k),)](
            data, out, rows, k, padded_k, *data.stride(), *moved.reshape(-1, *moved.shape[-2:]).stride(),
            HADAMARD=size, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out


@functools.cache
def config_of(
    format: str, block: str, scale_rule: str, global_scale: str, rounding: str, hadamard: int, static_amax: float | None
) -> QuantConfig:  # fmt: skip
    return QuantConfig(
        format=format, block=block, scale_rule=scale_rule, global_scale=global_scale, rounding=rounding,  # type: ignore[arg-type]
        hadamard=hadamard, static_amax=static_amax,
    )  # fmt: skip


known_target = functools.cache(target_of)


def check(dtype: torch.dtype, device: torch.device, where: str, fmt: str) -> None:
    if dtype not in _FLOATS:
        raise UnsupportedDtype(where=where, found=dtype, fmt=fmt)
    known_target(device, where=where)


@contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be that of the tensor."""
    with torch.cuda.device_of(x):
        yield

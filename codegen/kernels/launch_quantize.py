"""Host side of quantization: the CUDA implementations of `fp4::quantize` and `fp4::hadamard`. Results are contiguous.

Nothing here waits for the device. A decoder quantizes some two hundred small activations a token, so what depends on shapes alone is
planned once, few rows take one launch, and no buffer has to be zeroed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fp4compile.codegen.errors import Fp4CompileError, UnsupportedDtype
from fp4compile.codegen.formats import GlobalScale, Layout, QuantConfig, Rounding, round_up
from fp4compile.codegen.kernels.kernel_call import KernelCall, on_device
from fp4compile.codegen.kernels.launch_dequantize import tile_on_device
from fp4compile.codegen.kernels.quantize import amax_kernel, hadamard_kernel, quantize_here_kernel, quantize_kernel
from fp4compile.codegen.kernels.quantize_tiles import Tile, View, multiprocessors, power_of_two, steps, tile_of, tile_of_rows
from fp4compile.codegen.ops import config_of
from fp4compile.codegen.reference.layout import laid_out_shapes, lay_out_ref
from fp4compile.codegen.target import known_target

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: Final = {"num_stages": 1, "enable_fp_fusion": False}  # FMA would change bits
MOST_MATRICES: Final = 65_535  # the second and third dimension of a grid
_TILES_OF_A_SMALL_MATRIX: Final = 16  # that every program reads to find the maximum by itself


class TooManyMatrices(Fp4CompileError, ValueError):
    template = (
        "fp4::quantize: a batch of {found} matrices is to be rounded stochastically, at most {most} can be. "
        "Flatten leading dimensions into the rows."
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a quantization that its tensor's dtype, shape and strides decide."""

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
        """(rows, units) that tiles must cover, the padding of scales included."""
        rows, groups = self.span
        return rows, -(-groups * self.config.fmt.block // self.unit)

    @property
    def content(self) -> tuple[int, int]:
        """(rows, units) of x."""
        return self.view.rows, self.padded_k // self.unit

    @property
    def needs_amax(self) -> bool:
        return self.config.fmt.has_global_scale and self.config.global_scale is GlobalScale.TENSOR

    @functools.cached_property
    def finds_amax_here(self) -> bool:
        """Whether the kernel that quantizes finds the maximum of its rows, or of a small matrix, by itself."""
        if self.config.fmt.has_global_scale and self.config.global_scale is GlobalScale.ROW:
            return True
        a_tiles, b_tiles = self.tiles(self.tile, self.content)
        quickly_compiled = self.unit < 64  # larger units take Triton up to a minute a kernel, so small matrices share that of large ones
        return self.needs_amax and quickly_compiled and a_tiles * b_tiles <= _TILES_OF_A_SMALL_MATRIX

    @functools.cached_property
    def tile(self) -> Tile:
        config, (rows, units) = self.config, self.extent
        if config.global_scale is GlobalScale.ROW and not (self.view.across or config.scale_rule.tries_two):
            return tile_of_rows(self.view, self.unit, rows, units)
        elements, warps = 4096, None
        if config.is_tile or config.scale_rule.tries_two:
            elements, warps = 4096 if config.is_tile else 2048, 4
        return tile_of(self.view, self.unit, rows, units, is_tile=config.is_tile, elements=elements, warps=warps)

    def tiles(self, tile: Tile, extent: tuple[int, int]) -> tuple[int, int]:
        """How many of them along their first and second dimension cover `extent`, (rows, units)."""
        rows, units = extent
        a, b = (units, rows) if self.view.across else (rows, units)
        return -(-a // tile.a), -(-b // tile.b)

    @functools.cached_property
    def reading(self) -> dict[str, Any]:
        """How kernels load, apart from their tiles."""
        view, access = self.view, self.view.access(self.unit)
        stride_b, stride_r, stride_k = view.strides(access)
        return {
            "rows": view.rows, "k": view.k, "stride_b": stride_b, "stride_r": stride_r, "stride_k": stride_k, "ACCESS": access,
            "STRIDE_K": view.constant_stride(access), "ACROSS": view.across, "UNIT": self.unit, "HADAMARD": self.config.hadamard,
        }  # fmt: skip

    @functools.cached_property
    def arithmetic(self) -> dict[str, Any]:
        config, (row_span, group_span) = self.config, self.span
        eden = config.rounding is Rounding.EDEN
        return {
            "groups": self.groups, "row_span": row_span, "group_span": group_span, "BOUND": config.encode_bound,
            "IS_TILE": config.is_tile, "SCALE_RULE": "eden" if eden else str(config.scale_rule),
            "STOCHASTIC": config.rounding is Rounding.STOCHASTIC, "SWIZZLED": self.swizzled, "CAPABILITY": self.capability,
        }  # fmt: skip

    @functools.cached_property
    def quantize(self) -> KernelCall:
        """The kernel that quantizes, on x, the maxima where it does not find them, seed, codes, scales and decode multipliers."""
        tile = self.tile
        a_tiles, b_tiles = self.tiles(tile, self.extent)
        numbers = {"A": tile.a, "B": tile.b} | self.arithmetic | self.reading
        options = {"num_warps": tile.warps} | OPTIONS
        if self.finds_amax_here:
            row_tiles, unit_tiles = (b_tiles, a_tiles) if self.view.across else (a_tiles, b_tiles)
            per_row = self.config.global_scale is GlobalScale.ROW
            grid = (row_tiles, self.view.batch)
            read = self.tiles(tile, self.content)[1 if self.view.across else 0]
            return KernelCall(quantize_here_kernel, grid, options, PER_ROW=per_row, ROW_TILES=read, UNIT_TILES=unit_tiles, **numbers)
        programs = steps(a_tiles, b_tiles, self.view.batch, self.processors * tile.programs)
        parts = self.amax_grid[0] * self.amax_grid[1] if self.needs_amax else 1
        return KernelCall(
            quantize_kernel, (b_tiles, programs, self.view.batch), options, static_amax=self.config.static_amax or 0.0, parts=parts,
            a_tiles=a_tiles, FORMAT=self.config.format, MOST_PARTS=power_of_two(parts), **numbers,
        )  # fmt: skip

    @functools.cached_property
    def amax_tile(self) -> Tile:
        return tile_of(self.view, self.unit, *self.content, is_tile=False, elements=8192, warps=4)

    @functools.cached_property
    def amax_grid(self) -> tuple[int, int, int]:
        a_tiles, b_tiles = self.tiles(self.amax_tile, self.content)
        return b_tiles, steps(a_tiles, b_tiles, self.view.batch, self.processors * 4), self.view.batch

    @functools.cached_property
    def amax(self) -> KernelCall:
        """The kernel that leaves maxima, on x, what it leaves, and what it leaves of x before the rotation, or None."""
        tile = self.amax_tile
        numbers = {"a_tiles": self.tiles(tile, self.content)[0], "A": tile.a, "B": tile.b} | self.reading
        return KernelCall(amax_kernel, self.amax_grid, {"num_warps": tile.warps} | OPTIONS, **numbers)

    @functools.cached_property
    def amax_of_both(self) -> KernelCall:
        """The same with a third tensor."""
        return KernelCall(amax_kernel, self.amax_grid, self.amax._options, **self.amax._numbers)


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
        return *tiled(codes, scales), decode
    batch_shape = x.shape[:-2]
    if x.ndim > 3:
        x = x.flatten(0, -3)
    if x.ndim == 3 and x.shape[0] > MOST_MATRICES:
        return _in_pieces(x, batch_shape, axis, format, block, scale_rule, global_scale, rounding, hadamard, static_amax, layout)
    plan = plan_of(
        x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0, x.device, batch_shape, axis, layout,
        format, block, scale_rule, global_scale, rounding, hadamard, static_amax,
    )  # fmt: skip
    if not x.numel():
        return _of_nothing(x, plan)
    codes, scales, decode = new_results(x, plan)
    bytes_ = scales.view(torch.uint8)
    with on_device(x):
        if plan.finds_amax_here:
            plan.quantize(x, seed_of(plan, seed), codes, bytes_, decode)
        else:
            amax = amax_of(x, plan) if plan.needs_amax else None
            plan.quantize(x, amax, seed_of(plan, seed), codes, bytes_, decode)
    return codes, scales, decode


def tiled(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Plain codes and scales in tiles: in training every weight after every step, so NVFP4's by one kernel."""
    if scales.dtype != torch.float8_e4m3fn:
        return lay_out_ref(codes, scales, Layout.TILED)
    with on_device(codes):
        return tile_on_device(codes, scales)


def _in_pieces(x: Tensor, batch_shape: torch.Size, axis: int, *config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of more matrices than a grid has room for. Random bytes are numbered through the whole batch, so draws cannot be cut."""
    *config, layout = config
    if config_of(*config).draws:
        raise TooManyMatrices(found=x.shape[0], most=MOST_MATRICES)
    parts = [quantize(piece, axis, *config, layout=layout) for piece in x.split(MOST_MATRICES)]
    codes, scales, decode = (torch.cat([t.view(torch.uint8) if t.itemsize == 1 else t for t in each]) for each in zip(*parts, strict=True))
    scales = scales.view(parts[0][1].dtype)
    return tuple(t.view(*batch_shape, *t.shape[1:]) for t in (codes, scales, decode))  # type: ignore[return-value]


def new_results(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(plan.codes_shape, dtype=torch.uint8),
        x.new_empty(plan.scales_shape, dtype=plan.config.fmt.scale_dtype),
        x.new_empty(plan.decode_shape, dtype=torch.float32),
    )


def _of_nothing(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Of a tensor without elements: padding, and global scales as of zeros."""
    codes, scales, decode = new_results(x, plan)
    scales.view(torch.uint8).zero_()
    amax = plan.config.static_amax
    if amax is None:
        return codes, scales, decode.fill_(1.0)
    bound = decode.new_full((), plan.config.encode_bound)
    return codes, scales, decode.copy_(1 / (bound / amax).clamp(max=torch.finfo(torch.float32).max))


def seed_of(plan: Plan, seed: Tensor | None) -> Tensor | None:
    draws = plan.config.draws
    assert not draws or (seed is not None and seed.dtype is torch.int64), "stochastic rounding draws from an int64 seed"
    return seed if draws else None


def amax_of(x: Tensor, plan: Plan) -> Tensor:
    """(batch, parts) float32 whose maxima are the matrices', rotated as `plan` says."""
    columns, programs, batch = plan.amax_grid
    amax = x.new_empty((batch, columns * programs), dtype=torch.float32)
    plan.amax(x, amax, None)
    return amax


def amax_with_plain(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The same, and of `x` before the rotation, in one reading."""
    columns, programs, batch = plan.amax_grid
    amax, plain = x.new_empty((2, batch, columns * programs), dtype=torch.float32)
    plan.amax_of_both(x, amax, plain)
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
    with on_device(x):
        hadamard_kernel[(batch * -(-rows // block_r) * -(-padded_k // block_k),)](
            data, out, rows, k, padded_k, *data.stride(), *moved.reshape(-1, *moved.shape[-2:]).stride(),
            HADAMARD=size, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out


def check(dtype: torch.dtype, device: torch.device, where: str, fmt: str) -> None:
    if dtype not in _FLOATS:
        raise UnsupportedDtype(where=where, found=dtype, fmt=fmt)
    known_target(device, where=where)

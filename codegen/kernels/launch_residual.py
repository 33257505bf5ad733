"""Host side of `fp4::quantize_residual` on CUDA. What depends on shapes alone is planned once, as in `launch_quantize.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4compile.codegen.formats import E2M1_MAX, GlobalScale, Layout, QuantConfig
from fp4compile.codegen.kernels import launch_quantize
from fp4compile.codegen.kernels.kernel_call import KernelCall, on_device
from fp4compile.codegen.kernels.launch_quantize import OPTIONS, Plan, amax_of, plan_of
from fp4compile.codegen.kernels.quantize_residual import quantize_residual_here_kernel, quantize_residual_kernel
from fp4compile.codegen.kernels.quantize_tiles import ELEMENTS, QUADS, Tile, power_of_two, steps
from fp4compile.codegen.ops import quantize_args
from fp4compile.codegen.reference.layout import laid_out_shapes, lay_out_ref
from fp4compile.codegen.reference.residual import quantize_residual_ref

_LANES = 128  # a block each, four warps: a residual needs the registers of a second quantization


@dataclass(frozen=True, kw_only=True)
class ResidualPlan:
    """A quantization with residuals, on top of that of the same tensor without: `whole` finds the maximum and knows the strides."""

    whole: Plan
    outliers: int
    by_block: bool
    swizzled: bool

    @property
    def blocks(self) -> int:
        return self.whole.groups

    @property
    def plain(self) -> int:
        return self.blocks - self.outliers // self.whole.config.fmt.block

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of codes and scales of one matrix."""
        wide = self.whole.padded_k + self.outliers
        layout = Layout.SWIZZLED if self.swizzled else Layout.PLAIN
        return laid_out_shapes(self.whole.view.rows, wide // 2, wide // self.whole.config.fmt.block, layout)

    @functools.cached_property
    def span(self) -> tuple[int, int]:
        """(rows, blocks) of the scales that are stored, padding included."""
        rows, groups = self.whole.view.rows, 2 * self.blocks - self.plain
        return (-(-rows // 128) * 128, -(-groups // 4) * 4) if self.swizzled else (rows, groups)

    @functools.cached_property
    def tile(self) -> Tile:
        b = min(power_of_two(self.blocks), _LANES)
        return Tile(a=max(1, min(_LANES // b, power_of_two(self.span[0]))), b=b, warps=4)

    @functools.cached_property
    def tiles(self) -> tuple[int, int]:
        """How many cover the rows, and the blocks of x; padding included."""
        rows, groups = self.span
        return -(-rows // self.tile.a), -(-(groups - (self.blocks - self.plain)) // self.tile.b)

    @functools.cached_property
    def finds_amax_here(self) -> bool:
        config, (row_tiles, block_tiles) = self.whole.config, self.tiles
        if config.fmt.has_global_scale and config.global_scale is GlobalScale.ROW:
            return True
        return self.whole.needs_amax and row_tiles * block_tiles <= launch_quantize._TILES_OF_A_SMALL_MATRIX

    @functools.cached_property
    def numbers(self) -> dict[str, Any]:
        config, view, (row_span, group_span) = self.whole.config, self.whole.view, self.span
        access = QUADS if not view.across and view.access(config.fmt.block) == QUADS else ELEMENTS
        stride_b, stride_r, stride_k = view.strides(access)
        return {
            "rows": view.rows, "k": view.k, "plain": self.plain, "blocks": self.blocks, "row_span": row_span, "group_span": group_span,
            "stride_b": stride_b, "stride_r": stride_r, "stride_k": stride_k, "BOUND": E2M1_MAX * config.scale_rule.e4m3_bound,
            "SCALE_RULE": str(config.scale_rule), "SWIZZLED": self.swizzled, "CAPABILITY": self.whole.capability,
            "BY_BLOCK": self.by_block, "ACCESS": access, "UNIT": config.fmt.block, "A": self.tile.a, "B": self.tile.b,
        }  # fmt: skip

    @functools.cached_property
    def quantize(self) -> KernelCall:
        """On x, its order, the maxima where the kernel does not find them, codes, scales and decode multipliers."""
        config, batch, (row_tiles, block_tiles) = self.whole.config, self.whole.view.batch, self.tiles
        options = {"num_warps": self.tile.warps} | OPTIONS
        if self.finds_amax_here:
            few = row_tiles * batch < self.whole.processors
            grid = (row_tiles, block_tiles if few else 1, batch)
            per_row = config.global_scale is GlobalScale.ROW
            numbers = {"row_tiles": -(-self.whole.view.rows // self.tile.a), "block_tiles": -(-self.blocks // self.tile.b)}
            return KernelCall(quantize_residual_here_kernel, grid, options, PER_ROW=per_row, **numbers, **self.numbers)
        programs = steps(row_tiles, block_tiles, batch, self.whole.processors * self.tile.programs)
        parts = self.whole.amax_grid[0] * self.whole.amax_grid[1] if self.whole.needs_amax else 1
        return KernelCall(
            quantize_residual_kernel, (block_tiles, programs, batch), options, static_amax=config.static_amax or 0.0, parts=parts,
            row_tiles=row_tiles, FORMAT=config.format, MOST_PARTS=power_of_two(parts), **self.numbers,
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _plan_of(whole: Plan, outliers: int, by_block: bool, swizzled: bool) -> ResidualPlan:
    return ResidualPlan(whole=whole, outliers=outliers, by_block=by_block, swizzled=swizzled)


def quantize_residual(
    x: Tensor, axis: int, order: Tensor, outliers: int, config: QuantConfig, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`fp4::quantize_residual`: see `reference.residual.quantize_residual_ref`, with which every bit agrees.

    Raises `UnsupportedDtype` or `UnsupportedDevice`.
    """
    if layout == Layout.TILED or not x.numel():
        codes, scales, decode = (
            quantize_residual(x, axis, order, outliers, config, Layout.PLAIN)
            if x.numel()
            else quantize_residual_ref(x, order, outliers, config, axis=axis)
        )
        return *lay_out_ref(codes, scales, layout), decode
    batch_shape = x.shape[:-2]
    if x.ndim > 3:
        x = x.flatten(0, -3)
    if x.ndim == 3 and x.shape[0] > launch_quantize.MOST_MATRICES:
        parts = [quantize_residual(piece, axis, order, outliers, config, layout) for piece in x.split(launch_quantize.MOST_MATRICES)]
        return tuple(_joined(each, batch_shape) for each in zip(*parts, strict=True))  # type: ignore[return-value]
    whole = plan_of(
        x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0, x.device, batch_shape, axis, Layout.PLAIN, *quantize_args(config)
    )  # fmt: skip
    plan = _plan_of(whole, outliers, order.numel() < whole.padded_k, layout == Layout.SWIZZLED)
    return _launched(x, order, plan, batch_shape)


def _launched(x: Tensor, order: Tensor, plan: ResidualPlan, batch_shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty((*batch_shape, *plan.shapes[0]), dtype=torch.uint8)
    scales = x.new_empty((*batch_shape, *plan.shapes[1]), dtype=plan.whole.config.fmt.scale_dtype)
    decode = x.new_empty(plan.whole.decode_shape, dtype=torch.float32)
    bytes_ = scales.view(torch.uint8)
    with on_device(x):
        if plan.finds_amax_here:
            plan.quantize(x, order, codes, bytes_, decode)
        else:
            amax = amax_of(x, plan.whole) if plan.whole.needs_amax else None
            plan.quantize(x, order, amax, codes, bytes_, decode)
    return codes, scales, decode


def _joined(pieces: tuple[Tensor, ...], batch_shape: torch.Size) -> Tensor:
    whole = torch.cat([piece.view(torch.uint8) if piece.itemsize == 1 else piece for piece in pieces])
    return whole.view(pieces[0].dtype).view(*batch_shape, *whole.shape[1:])

"""Host side of `fp4::quantize_both`: one reading of x where both halves allow it, else two quantizations."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fp4compile.codegen.formats import GlobalScale, Layout
from fp4compile.codegen.kernels.kernel_call import KernelCall, on_device
from fp4compile.codegen.kernels.launch_quantize import (
    MOST_MATRICES,
    OPTIONS,
    Plan,
    amax_of,
    amax_with_plain,
    new_results,
    plan_of,
    quantize,
    seed_of,
)
from fp4compile.codegen.kernels.quantize_both import quantize_both_kernel
from fp4compile.codegen.kernels.quantize_tiles import power_of_two, steps

REGION: Final = (64, 64, 4, 4)  # rows and columns of a program, at least; its warps; programs a multiprocessor
Quantized = tuple[Tensor, Tensor, Tensor]


def quantize_both(
    x: Tensor, row: tuple[Any, ...], column: tuple[Any, ...], row_seed: Tensor | None, column_seed: Tensor | None,
    row_layout: str, column_layout: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`quantize(x, -1, *row, row_seed)`, then `quantize(x, -2, *column, column_seed)`: see `ops.quantize_both_args`."""
    if x.ndim <= 3 and x.numel() and x.shape[:-2].numel() <= MOST_MATRICES and Layout.TILED not in (row_layout, column_layout):
        swap = x.stride(-2) == 1 and x.stride(-1) != 1
        one, other = (row, row_layout), (column, column_layout)
        seeds = (row_seed, column_seed)
        if swap:
            x, one, other, seeds = x.mT, other, one, seeds[::-1]
        plan = _plan_of(x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0, x.device, x.shape[:-2], one, other)
        if plan.fits_one_kernel:
            first, second = _in_one_kernel(x, plan, *seeds)
            return (*second, *first) if swap else (*first, *second)
        x = x.mT if swap else x
    return (
        *quantize(x, -1, *row, row_seed, layout=row_layout),
        *quantize(x, -2, *column, column_seed, layout=column_layout),
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Of a quantization along the rows of a matrix and one across them."""

    along: Plan
    across: Plan

    @property
    def fits_one_kernel(self) -> bool:
        """Memory must run along the rows of the one and across those of the other; a scale for each row needs the whole row first."""
        row_scales = GlobalScale.ROW in (self.along.config.global_scale, self.across.config.global_scale)
        return self.along.view.stride_k == 1 and self.across.view.across and not row_scales

    @functools.cached_property
    def parts(self) -> tuple[int, int]:
        """How many maxima each side's scale is made of."""
        grid, grid_t = self.along.amax_grid, self.across.amax_grid
        if self.along.needs_amax and self.across.needs_amax:
            # One reading serves both: see `_both_amax`.
            if not self.along.config.hadamard:
                grid = grid_t if self.across.config.hadamard else grid
            if not self.across.config.hadamard:
                grid_t = grid
        return grid[0] * grid[1], grid_t[0] * grid_t[1]

    @functools.cached_property
    def quantize(self) -> KernelCall:
        """The kernel, on x, then of each side maxima or None, seed or None, codes, scales and decode multipliers."""
        along, across = self.along, self.across
        down, right, warps = max(REGION[0], across.unit), max(REGION[1], along.unit), REGION[2]
        rows, units = along.extent
        rows_t, units_t = across.extent
        regions_down = -(-max(rows, units_t * across.unit) // down)
        regions_right = -(-max(rows_t, units * along.unit) // right)
        batch = along.view.batch
        programs = steps(regions_down, regions_right, batch, along.processors * REGION[3])
        reading, reading_t = along.reading, across.reading
        return KernelCall(
            quantize_both_kernel, (regions_right, programs, batch), {"num_warps": warps} | OPTIONS,
            rows=reading["rows"], columns=reading["k"], regions_down=regions_down, stride_b=reading["stride_b"],
            stride_r=along.view.stride_r, row_stride=reading["stride_r"], STRIDE_T=reading_t["STRIDE_K"], CAPABILITY=along.capability,
            DOWN=down, RIGHT=right,
            **_side(along, self.parts[0], ""), **_side(across, self.parts[1], "_t"),
        )  # fmt: skip


def _side(plan: Plan, parts: int, suffix: str) -> dict[str, Any]:
    """The kernel's numbers of one half; constants are upper case, and so is their suffix."""
    parts = parts if plan.needs_amax else 1
    static, fmt = plan.config.static_amax or 0.0, plan.config.format
    numbers: dict[str, Any] = {"static_amax": static, "parts": parts, "MOST_PARTS": power_of_two(parts), "FORMAT": fmt}
    numbers |= plan.arithmetic | {name: plan.reading[name] for name in ("ACCESS", "UNIT", "HADAMARD")}
    del numbers["CAPABILITY"]
    return {name + (suffix.upper() if name.isupper() else suffix): value for name, value in numbers.items()}


@functools.lru_cache(maxsize=4096)
def _plan_of(
    dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], aligned: bool, device: torch.device, batch_shape: torch.Size,
    row: tuple[tuple[Any, ...], str], column: tuple[tuple[Any, ...], str],
) -> _Plan:  # fmt: skip
    along, across = (
        plan_of(dtype, shape, strides, aligned, device, batch_shape, axis, layout, *config)
        for axis, (config, layout) in ((-1, row), (-2, column))
    )
    return _Plan(along=along, across=across)


def _in_one_kernel(x: Tensor, plan: _Plan, seed: Tensor | None, seed_t: Tensor | None) -> tuple[Quantized, Quantized]:
    with on_device(x):
        amax, amax_t = _both_amax(x, plan.along, plan.across)
        one, other = new_results(x, plan.along), new_results(x, plan.across)
        (codes, scales, decode), (codes_t, scales_t, decode_t) = one, other
        plan.quantize(
            x, amax, seed_of(plan.along, seed), codes, scales.view(torch.uint8), decode,
            amax_t, seed_of(plan.across, seed_t), codes_t, scales_t.view(torch.uint8), decode_t,
        )  # fmt: skip
    return one, other


def _both_amax(x: Tensor, along: Plan, across: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Maxima of both sides, in one reading of x unless both are rotated."""
    if along.needs_amax and across.needs_amax:
        turned, turned_t = along.config.hadamard, across.config.hadamard
        if not turned and not turned_t:
            amax = amax_of(x, along)
            return amax, amax
        if not turned:
            rotated, plain = amax_with_plain(x, across)
            return plain, rotated
        if not turned_t:
            return amax_with_plain(x, along)
    return tuple(amax_of(x, plan) if plan.needs_amax else None for plan in (along, across))  # type: ignore[return-value]

"""Host side of `fp4::quantize_both`: one reading of x where both halves allow it, else two quantizations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fp4compile.codegen.formats import GlobalScale, Layout
from fp4compile.codegen.kernels.launch_quantize import (
    OPTIONS,
    PROGRAMS_A_PROCESSOR,
    Plan,
    amax_of,
    needs_amax,
    new_results,
    on_device_of,
    plan_of,
    quantize,
    seed_of,
)
from fp4compile.codegen.kernels.quantize_both import quantize_both_kernel
from fp4compile.codegen.kernels.quantize_tiles import power_of_two

Quantized = tuple[Tensor, Tensor, Tensor]


def quantize_both(
    x: Tensor, row: tuple[Any, ...], column: tuple[Any, ...], row_seed: Tensor | None, column_seed: Tensor | None,
    row_layout: str, column_layout: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`quantize(x, -1, *row, row_seed)`, then `quantize(x, -2, *column, column_seed)`: see `ops.quantize_both_args`."""
    if x.ndim <= 3 and x.numel() and Layout.TILED not in (row_layout, column_layout):
        swap = x.stride(-2) == 1 and x.stride(-1) != 1
        sides = (x.mT, column, row, column_layout, row_layout) if swap else (x, row, column, row_layout, column_layout)
        along, across = _plans(*sides)
        if _fit_one_kernel(along, across):
            seeds = (column_seed, row_seed) if swap else (row_seed, column_seed)
            one, other = _in_one_kernel(sides[0], along, across, *seeds)
            return (*other, *one) if swap else (*one, *other)
    return (
        *quantize(x, -1, *row, row_seed, layout=row_layout),
        *quantize(x, -2, *column, column_seed, layout=column_layout),
    )


def _plans(x: Tensor, row: tuple[Any, ...], column: tuple[Any, ...], row_layout: str, column_layout: str) -> tuple[Plan, Plan]:
    where = (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0, x.device, x.shape[:-2])
    return plan_of(*where, -1, row_layout, *row), plan_of(*where, -2, column_layout, *column)


def _fit_one_kernel(along: Plan, across: Plan) -> bool:
    """Memory must run along the rows of the one and across those of the other; a scale for each row needs the whole row first."""
    row_scales = GlobalScale.ROW in (along.config.global_scale, across.config.global_scale)
    return along.view.stride_k == 1 and across.view.across and not row_scales


def _in_one_kernel(
    x: Tensor, along: Plan, across: Plan, seed: Tensor | None, seed_t: Tensor | None
) -> tuple[Quantized, Quantized]:  # fmt: skip
    with on_device_of(x):
        amax, amax_t = _both_amax(x, along, across)
        one, other = new_results(x, along), new_results(x, across)
        down, right, warps = region_of(along, across)
        rows, units = along.extent
        rows_t, units_t = across.extent
        regions_down = -(-max(rows, units_t * across.unit) // down)
        regions_right = -(-max(rows_t, units * along.unit) // right)
        view = along.view
        regions = view.batch * regions_down * regions_right
        access, access_t = view.access(along.unit), across.view.access(across.unit)
        quantize_both_kernel[(min(regions, along.processors * PROGRAMS_A_PROCESSOR),)](
            x, view.rows, view.k, regions_down, regions_right, regions, view.stride_b, view.stride_r,
            view.strides(access)[1], across.view.strides(access_t)[2],
            *_side(along, amax, seed, one), *_side(across, amax_t, seed_t, other),
            **_constants(along, access, ""), **_constants(across, access_t, "_T"),
            CAPABILITY=along.capability, MOST_PARTS=_most_parts(amax), MOST_PARTS_T=_most_parts(amax_t),
            ONE_MATRIX=view.batch == 1, DOWN=down, RIGHT=right,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return one, other


def region_of(along: Plan, across: Plan) -> tuple[int, int, int]:
    """Rows, columns and warps of a program."""
    return max(64, across.unit), max(128, along.unit), 8


def _side(plan: Plan, amax: Tensor | None, seed: Tensor | None, results: Quantized) -> tuple[Any, ...]:
    codes, scales, decode = results
    parts = 0 if amax is None else amax.shape[-1]
    static = plan.config.static_amax or 0.0
    return (amax, static, parts, seed_of(plan, seed), codes, scales.view(codes.dtype), decode, plan.groups, *plan.span)


def _constants(plan: Plan, access: int, suffix: str) -> dict[str, Any]:
    named = {"FORMAT": plan.config.format, "ACCESS": access, "UNIT": plan.unit, "HADAMARD": plan.config.hadamard, **plan.arithmetic}
    return {name + suffix: value for name, value in named.items() if name != "CAPABILITY"}


def _most_parts(amax: Tensor | None) -> int:
    return 1 if amax is None else power_of_two(amax.shape[-1])


def _both_amax(x: Tensor, along: Plan, across: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Maxima of both sides, in one reading of x unless both are rotated."""
    if needs_amax(along) and needs_amax(across):
        turned, turned_t = along.config.hadamard, across.config.hadamard
        if not turned and not turned_t:
            amax = amax_of(x, along)[0]
            return amax, amax
        if not turned:
            rotated, plain = amax_of(x, across, plain_too=True)
            return plain, rotated
        if not turned_t:
            return amax_of(x, along, plain_too=True)
    return tuple(amax_of(x, plan)[0] if needs_amax(plan) else None for plan in (along, across))  # type: ignore[return-value]

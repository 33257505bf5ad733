"""The native products as a Blackwell GPU would launch them, for every row of the table of tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernels import launch_native, launch_native_grouped
from fp4compile.codegen.kernels.native_tiles import Architecture, NativeTile, Plan

N, K = 4096, 8192
_SCALES = {"nvfp4": (16, torch.float8_e4m3fn), "mxfp4": (32, torch.float8_e8m0fnu)}


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What happens to a tile after its sum."""

    name: str
    bias: tuple[int, ...] | None
    out_dtype: torch.dtype
    n: int = N


# The usual one, the one that needs most registers, and stores that TMA cannot do.
USUAL = Epilogue(name="bf16, bias", bias=(N,), out_dtype=torch.bfloat16)
HEAVIEST = Epilogue(name="fp32, bias of each element", bias=(0, N), out_dtype=torch.float32)
RAGGED = Epilogue(name="bf16, ragged n", bias=None, out_dtype=torch.bfloat16, n=N + 1)


def native_product(
    architecture: Architecture, tile: NativeTile, fmt: str, epilogue: Epilogue, *, layout: str = Layout.SWIZZLED
) -> Callable[[], object]:
    """A call of the launcher with operands of the right sizes, whose memory is never read."""
    m, n = 4096 if tile.block_c >= 128 else tile.block_c, epilogue.n
    a, b = _operand(m, fmt, layout, rows_scaled=True), _operand(n, fmt, layout, rows_scaled=False)
    bias = None if epilogue.bias is None else torch.empty([m if size == 0 else size for size in epilogue.bias], dtype=torch.bfloat16)
    return lambda: launch_native.scaled_mm(
        *a,
        *b,
        bias,
        K,
        epilogue.out_dtype,
        a_layout=layout,
        b_layout=layout,
        capability=architecture.capabilities[0],
        chosen=Plan(tile=tile, splits=1),
    )


def native_grouped_product(
    architecture: Architecture, tile: NativeTile, fmt: str, *, layout: str = Layout.SWIZZLED
) -> Callable[[], object]:
    """The same for eight experts with as many tokens each as the tile has columns."""
    groups = 8
    a, b = _operand(groups * tile.block_c, fmt, layout, rows_scaled=True), _operand(N, fmt, layout, rows_scaled=False)
    experts = [t.expand(groups, *t.shape) for t in b]
    return lambda: launch_native_grouped.scaled_grouped_mm(
        *a, *experts, torch.zeros(groups, dtype=torch.int32), K, torch.bfloat16, a_layout=layout, b_layout=layout,
        capability=architecture.capabilities[0], chosen=tile,
    )  # fmt: skip


def _operand(rows: int, fmt: str, layout: str, *, rows_scaled: bool) -> tuple[Tensor, Tensor, Tensor]:
    block, dtype = _SCALES[fmt]
    shape = (-(-rows // 128) * 128 * K // block,) if layout == Layout.SWIZZLED else (rows, K // block)
    scales = torch.empty(shape, dtype=torch.uint8).view(dtype)
    return torch.empty(rows, K // 2, dtype=torch.uint8), scales, torch.empty((rows,) if rows_scaled else ())

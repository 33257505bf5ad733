"""Our operators as the compiled graph calls them: weights laid out as the kernel reads them, activations as they come."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from fp4compile.bench.case import MatmulCase, QuantizeCase
from fp4compile.codegen import ops
from fp4compile.codegen.formats import Layout, QuantConfig, Rounding
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.reference.layout import suits_tiles
from fp4compile.codegen.registry import kernel_for, layouts_for
from fp4compile.codegen.target import Target
from fp4compile.codegen.timing import Call

_FEW_ROWS: Final = 64
Quantized = tuple[Tensor, Tensor, Tensor]  # codes, scales, global scale
Side = tuple[Tensor, Tensor | None, Tensor | None]  # the same, or a high-precision tensor and twice None


@dataclass(frozen=True, kw_only=True)
class Product:
    """How a `MatmulCase` runs on a target: kernel family, layouts of both sides, and how each is quantized."""

    case: MatmulCase
    kernel: str
    a_layout: Layout
    b_layout: Layout
    offs: Tensor | None  # (groups,) int32, where the rows of each weight end

    @classmethod
    def of(cls, case: MatmulCase, target: Target, device: torch.device) -> Product:
        config, op = QuantConfig(format=case.format), "scaled_grouped_mm" if case.groups else "scaled_mm"
        spec = KernelSpec(op=op, lhs=config if case.activation == "fp4" else None, rhs=config, dtype=torch.bfloat16)
        a_layout, b_layout = layouts_for(spec, target)
        kernel = kernel_for(spec, target)
        name = kernel if isinstance(kernel, str) else kernel.reason
        return cls(
            case=case, kernel=name, a_layout=a_layout if _a_may_have(case, a_layout) else Layout.PLAIN,
            b_layout=b_layout if _b_may_have(case, b_layout) else Layout.PLAIN, offs=offsets(case, device) if case.groups else None,
        )  # fmt: skip

    def quantize(self, x: Tensor, layout: str = Layout.PLAIN) -> Quantized:
        kwargs: dict[str, Any] = {} if layout == Layout.PLAIN else {"layout": str(layout)}
        return ops.QUANTIZE(x, -1, *ops.quantize_args(QuantConfig(format=self.case.format)), None, **kwargs)

    def weight(self, dense: Tensor) -> Quantized:
        """`dense` (n, k), or (groups, n, k), as the weight store keeps it."""
        return self.quantize(dense, self.b_layout)

    def left(self, x: Tensor) -> Side:
        """x (m, k) as the product takes it: quantized where the case says so."""
        return self.quantize(x, self.a_layout) if self.case.activation == "fp4" else (x, None, None)

    def multiply(self, left: Side, weight: Side, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """(m, n) in `out_dtype`."""
        layouts: dict[str, Any] = {"a_layout": self.a_layout, "b_layout": self.b_layout}
        layouts = {name: str(layout) for name, layout in layouts.items() if layout != Layout.PLAIN}
        if self.offs is not None:
            return ops.SCALED_GROUPED_MM(*left, *weight, self.offs, self.case.k, out_dtype, **layouts)
        return ops.SCALED_MM(*left, *weight, None, self.case.k, out_dtype, **layouts)

    def group_of_rows(self, rows: Tensor) -> Tensor:
        """Which weight each of `rows` of x meets."""
        return torch.zeros_like(rows) if self.offs is None else torch.searchsorted(self.offs.long(), rows, right=True)

    def call(self, x: Tensor, weight: Quantized) -> Tensor:
        """What is timed."""
        return self.multiply(self.left(x), weight)


def quantize_call(case: QuantizeCase, x: Tensor, seed: Tensor) -> Call:
    """Codes, scales, global scale of each copy. `seed` is drawn from where a copy is rounded stochastically."""
    seeds = [seed if config.rounding is Rounding.STOCHASTIC else None for config in case.configs]
    if case.axis is None:
        return partial(ops.QUANTIZE_BOTH, x, *ops.quantize_both_args(case.config, case.column_config), *seeds)
    return partial(ops.QUANTIZE, x, case.axis, *ops.quantize_args(case.config), *seeds)


def seed_on(device: torch.device) -> Tensor:
    return torch.tensor(1234, device=device)


def dense_weight(n: int, k: int, device: torch.device, copy: int) -> Tensor:
    """(n, k) bfloat16, another one for every `copy`."""
    generator = torch.Generator(device).manual_seed(copy)
    return (torch.randn(n, k, device=device, generator=generator) * 0.02).bfloat16()


def dense_weights(case: MatmulCase, device: torch.device, copy: int) -> Tensor:
    """(n, k) bfloat16, or (groups, n, k)."""
    stacked = dense_weight(max(case.groups, 1) * case.n, case.k, device, copy)
    return stacked.view(case.groups, case.n, case.k) if case.groups else stacked


def offsets(case: MatmulCase, device: torch.device) -> Tensor:
    """(groups,) int32: where the rows of x that go to each weight end. Uneven; a weight may get none."""
    generator = torch.Generator().manual_seed(case.groups)
    chance = torch.rand(case.groups, generator=generator) + 0.1
    chosen = torch.multinomial(chance, case.m, replacement=True, generator=generator)
    return torch.bincount(chosen, minlength=case.groups).cumsum(0).to(device, torch.int32)


def activation(m: int, k: int, device: torch.device) -> Tensor:
    """(m, k) bfloat16 whose rows are of different size, with a few outliers, as a transformer's are."""
    generator = torch.Generator(device).manual_seed(m)
    x = torch.randn(m, k, device=device, generator=generator)
    x[:, :: max(k // 4, 1)] *= 20
    return (x * torch.logspace(-1, 1, m, base=2, device=device)[:, None]).bfloat16()


def _a_may_have(case: MatmulCase, layout: Layout) -> bool:
    """As `passes.select_kernels` decides for a quantized x: scales of few rows stay plain."""
    return layout is Layout.SWIZZLED and case.m > _FEW_ROWS


def _b_may_have(case: MatmulCase, layout: Layout) -> bool:
    """As it decides for a weight: a tiled one has whole tiles, and little padding."""
    return layout is not Layout.TILED or suits_tiles(case.n, case.k)

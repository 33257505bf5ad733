"""Run a planned graph operator by operator, with each planned matmul quantized as its plan says, and measured.

Two plain matrices are what the plan is about, whatever the passes after it share, fuse and fold to make the same numbers cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig, Signs
from fp4compile.diagnosis.measure import OperandSums, Packed, decibels, measure
from fp4compile.instrumented import FIRST_FACTOR, PlannedGraph
from fp4compile.passes.site import Operand, Plan, Site

aten = torch.ops.aten

Key = tuple[str, str, str, str]  # matmul, role, kind of operand, what is done to it


@dataclass(kw_only=True)
class OperandFound:
    """One quantized operand of one site: what was measured of it, and of the matmul's result."""

    site: Site
    operand: Operand
    config: QuantConfig
    sums: OperandSums
    product_signal: float
    product_noise: float

    @property
    def product_db(self) -> float:
        """Signal to noise of the matmul's result, both operands quantized, against the same operands unquantized."""
        return decibels(self.product_signal, self.product_noise)


@dataclass(kw_only=True)
class Watch:
    """Collects what the graphs of one step show."""

    draws: int
    found: dict[Key, OperandFound] = field(default_factory=dict)

    def runner(self, gm: fx.GraphModule, parameters: Mapping[int, str]) -> Callable[[list[Any]], Any]:
        """`gm` as a callable that measures while it computes."""
        return lambda args: _Watching(gm, self).run(*args)

    def add(self, found: OperandFound, side: str) -> None:
        key = (found.site.name, str(found.site.role), side, found.config.describe())
        old = self.found.get(key)
        if old is not None:
            found.sums = old.sums + found.sums
            found.product_signal += old.product_signal
            found.product_noise += old.product_noise
        self.found[key] = found


class _Watching(PlannedGraph):
    def __init__(self, gm: fx.GraphModule, watch: Watch) -> None:
        super().__init__(gm)
        self.watch = watch

    def product(self, n: fx.Node, site: Site, plan: Plan, args: tuple[Any, ...]) -> Tensor:
        first = FIRST_FACTOR.get(n.target, 0)
        a, b = args[first : first + 2]
        signs = _signs(plan, a)
        left, left_sums = self._operand(a, plan.lhs, -1, signs)
        right, right_sums = self._operand(b, plan.rhs, -2, signs)
        if n.target is aten._grouped_mm.default:
            out = ops.SCALED_GROUPED_MM(*left, *right, args[2], a.shape[-1], site.dtype)
            exact = aten._grouped_mm.default(*args)
        else:
            bias = args[0] if first else None
            out = ops.SCALED_MM(*left, *right, bias, a.shape[-1], site.dtype)
            exact = torch.matmul(a.float(), b.float()) if bias is None else torch.matmul(a.float(), b.float()) + bias.float()
        signal, noise = _signal_and_noise(exact.float(), out.float())
        for side, operand, config, sums in (("a", site.lhs, plan.lhs, left_sums), ("b", site.rhs, plan.rhs, right_sums)):
            if config is not None and operand is not None and sums is not None:
                self.watch.add(
                    OperandFound(site=site, operand=operand, config=config, sums=sums, product_signal=signal, product_noise=noise), side
                )
        return out

    def _operand(
        self, x: Tensor, config: QuantConfig | None, axis: int, signs: Tensor | None
    ) -> tuple[Packed | tuple[Tensor, None, None], OperandSums | None]:
        if config is None:
            return (x if axis == -1 else x.mT, None, None), None
        return measure(x, config, axis=axis, draws=self.watch.draws, signs=signs if config.signs is Signs.RANDOM else None)


def _signs(plan: Plan, a: Tensor) -> Tensor | None:
    """(K,) fresh ones for this product, the same for both operands, where the plan asks for random signs: `hadamard` of them, repeated."""
    sizes = [config.hadamard for config in (plan.lhs, plan.rhs) if config is not None and config.signs is Signs.RANDOM]
    if not sizes:
        return None
    drawn = torch.randint(0, 2, (sizes[0],), device=a.device) * 2 - 1
    return drawn[torch.arange(a.shape[-1], device=a.device) % sizes[0]]


def _signal_and_noise(exact: Tensor, got: Tensor) -> tuple[float, float]:
    error = got - exact
    both = torch.stack([(exact * exact).sum(dtype=torch.float64), (error * error).sum(dtype=torch.float64)])
    signal, noise = both.tolist()
    return signal, noise

"""A model whose planned matmuls compute what we say: one capture a policy, then any choice of quantized sites without compiling again.

The graph, the sites and the configs are those of `backend="fp4"`, the numbers those of the `fp4::` operators that its kernels are held
against, run operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp4compile.codegen import ops
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import QuantConfig, round_up
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.residual import in_order_ref
from fp4compile.codegen.residual_ops import QUANTIZE_REPEATED, QUANTIZE_RESIDUAL
from fp4compile.instrumented import FIRST_FACTOR, Instrumented, PlannedGraph
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import OperandKind, Plan, Site
from fp4compile.policy.rule import Policy

aten, prims = torch.ops.aten, torch.ops.prims
# Position of the argument that says whether a backward will follow: where it was traced without one, it is false.
_LOG_SUM_EXP: Final[Mapping[object, int]] = {
    aten._scaled_dot_product_efficient_attention.default: 4,
    aten._scaled_dot_product_cudnn_attention.default: 4,
}

Packed = tuple[Tensor, Tensor, Tensor]  # codes, scales, global scale
Batch = Any  # a tensor, a tuple of positional arguments, or a mapping of keyword arguments
Product = Callable[["Call"], Tensor]


class ModelTrains(Fp4CompileError, RuntimeError):
    template = "sensitivity: the model is in training mode, where dropout would be measured instead of FP4. Call model.eval() first."


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What calls leave behind for later ones: weights quantized once, orders of channels on the device."""

    weights: dict[tuple[str, str, str], Packed] = field(default_factory=dict)
    orders: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One planned matmul about to run: A (..., M, K) times B (..., K, N), plus a bias, or grouped by offsets."""

    site: Site
    plan: Plan
    a: Tensor
    b: Tensor
    extra: Tensor | None
    exact: Callable[[], Tensor]  # the operator itself
    kept: Kept

    @property
    def grouped(self) -> bool:
        return self.site.op == "_grouped_mm"

    def quantized(self) -> Tensor:
        """The product as the policy has it."""
        left, right = (self._packed(lhs=side) or (self._rows(lhs=side), None, None) for side in (True, False))
        function = ops.SCALED_GROUPED_MM if self.grouped else ops.SCALED_MM
        wide = self.plan.outliers.count if self.plan.outliers else 0
        k = round_up(self.a.shape[-1], self._block) + wide if self.plan.outliers else self.a.shape[-1]
        return function(*left, *right, self.extra, k, self.site.dtype)

    def differences(self) -> tuple[Tensor | None, Tensor | None]:
        """What quantizing A alone and B alone adds to the result, float32 (..., M, N); None for an operand that stays."""
        a, b = self._padded(lhs=True), self._padded(lhs=False)
        of_a, of_b = self._error(a, lhs=True), self._error(b, lhs=False)
        return None if of_a is None else self._times(of_a, b), None if of_b is None else self._times(a, of_b)

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        """A (..., M, K) times B (..., N, K) transposed."""
        if self.grouped:
            return ops.SCALED_GROUPED_MM(a, None, None, b, None, None, self.extra, a.shape[-1], torch.float32)
        return a @ b.mT

    @property
    def _block(self) -> int:
        return max(config.fmt.block for config in (self.plan.lhs, self.plan.rhs) if config is not None)

    def _config(self, *, lhs: bool) -> QuantConfig | None:
        return self.plan.lhs if lhs else self.plan.rhs

    def _rows(self, *, lhs: bool) -> Tensor:
        """The operand in high precision, K last, rotated where the other one is."""
        rows = self.a if lhs else self.b.mT
        rotation = max(config.hadamard for config in (self.plan.lhs, self.plan.rhs) if config is not None)
        return ops.HADAMARD(rows, -1, rotation) if rotation else rows

    def _padded(self, *, lhs: bool) -> Tensor:
        """float32, what is quantized: K last, padded, and rotated or in order."""
        config = self.plan.lhs or self.plan.rhs
        assert config is not None
        if self.plan.outliers is not None:
            return in_order_ref(self.a if lhs else self.b.mT, self._order(), config).float()
        rows = self._rows(lhs=lhs).float()
        return F.pad(rows, (0, round_up(rows.shape[-1], self._block) - rows.shape[-1]))

    def _error(self, rows: Tensor, *, lhs: bool) -> Tensor | None:
        packed = self._packed(lhs=lhs)
        if packed is None:
            return None
        values = dequantize_ref(*packed)
        if self.plan.outliers is not None:
            values = self._once(values, lhs=lhs)
        return F.pad(values, (0, rows.shape[-1] - values.shape[-1])) - rows

    def _once(self, values: Tensor, *, lhs: bool) -> Tensor:
        """(..., Kp) of the wider operand: residuals of an activation added to their blocks, the copies of a weight's blocks left out."""
        assert self.plan.outliers is not None
        blocks = values.unflatten(-1, (-1, self._block))
        plain = blocks.shape[-2] - 2 * self.plan.outliers.count // self._block
        first, second = blocks[..., plain::2, :], blocks[..., plain + 1 :: 2, :]
        return torch.cat([blocks[..., :plain, :], first + second if lhs else first], dim=-2).flatten(-2)

    def _order(self) -> Tensor:
        assert self.plan.outliers is not None
        key = (self.plan.outliers.digest, self.a.device)
        if key not in self.kept.orders:
            self.kept.orders[key] = self.plan.outliers.order.to(self.a.device)
        return self.kept.orders[key]

    def _packed(self, *, lhs: bool) -> Packed | None:
        """The operand quantized, a weight once for all calls; None where it stays."""
        config, operand = self._config(lhs=lhs), self.site.lhs if lhs else self.site.rhs
        if config is None:
            return None
        if operand is None or operand.kind is not OperandKind.WEIGHT:
            return self._quantize(config, lhs=lhs)
        key = (self.site.name, operand.parameter, config.describe())
        if key not in self.kept.weights:
            self.kept.weights[key] = self._quantize(config, lhs=lhs)
        return self.kept.weights[key]

    def _quantize(self, config: QuantConfig, *, lhs: bool) -> Packed:
        x, axis, arguments = self.a if lhs else self.b, -1 if lhs else -2, ops.quantize_args(config)
        if self.plan.outliers is not None:
            widen = QUANTIZE_RESIDUAL if lhs else QUANTIZE_REPEATED
            return widen(x, axis, self._order(), self.plan.outliers.count, *arguments, **ops.quantize_keywords(config))
        return ops.QUANTIZE(x, axis, *arguments, None, **ops.quantize_keywords(config))


class PlannedModel:
    """`model` under `policy`. Each graph is captured at its first call; what its planned sites compute is chosen call by call."""

    def __init__(self, model: Callable[..., Any], policy: Policy) -> None:
        self._instrumented = Instrumented(model=model, policy=policy, runner=self._runner, name="sensitivity")
        self._kept = Kept()
        self._product: Product = exactly
        self._grad = False

    @property
    def graphs(self) -> list[GraphRecord]:
        return self._instrumented.graphs

    def __call__(self, batch: Batch, product: Product, *, grad: bool = False) -> Any:
        """Outputs for `batch` where every planned site computes `product(call)`; all other operators are the model's own.

        grad: results that require a gradient keep their history; parameters and inputs take no part in it. Raises `ModelTrains`.
        """
        model = self._instrumented.model
        if isinstance(model, nn.Module) and model.training:
            raise ModelTrains
        self._product, self._grad = product, grad
        with torch.no_grad():
            return call_with(self._instrumented.run, batch)

    def _runner(self, gm: fx.GraphModule, parameters: Mapping[int, str]) -> Callable[[list[Any]], Any]:
        def call(args: list[Any]) -> Any:
            with torch.set_grad_enabled(self._grad):
                inputs = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
                return _Running(gm, self._product, self._kept).run(*inputs)

        return call


class _Running(PlannedGraph):
    def __init__(self, gm: fx.GraphModule, what: Product, kept: Kept) -> None:
        super().__init__(gm)
        self.what, self.kept = what, kept

    def run_node(self, n: fx.Node) -> Any:
        if n.target is prims.convert_element_type.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return args[0].to(args[1])  # the operator itself has no derivative
        if torch.is_grad_enabled() and (at := _LOG_SUM_EXP.get(n.target)) is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.call_function(n.target, (*args[:at], True, *args[at + 1 :]), kwargs)
        return super().run_node(n)

    def product(self, n: fx.Node, site: Site, plan: Plan, args: tuple[Any, ...]) -> Tensor:
        first = FIRST_FACTOR.get(n.target, 0)
        a, b, *others = args[first:]
        extra = args[0] if first else others[0] if n.target is aten._grouped_mm.default else None

        def exact() -> Tensor:
            return self.call_function(n.target, *self.fetch_args_kwargs_from_env(n))  # type: ignore[arg-type]

        return self.what(Call(site=site, plan=plan, a=a, b=b, extra=extra, exact=exact, kept=self.kept))


def exactly(call: Call) -> Tensor:
    """In high precision."""
    return call.exact()


def call_with(function: Callable[..., Any], batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple) else function(batch)

"""A model whose planned matmuls compute what we say: one capture a policy, then any choice of quantized sites without compiling again.

The graph, the sites and the configs are those of `backend="fp4"`, the numbers those of the `fp4::` operators that its kernels are held
against, run operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp4compile import capture, handoff
from fp4compile.backend import context_of, follow_schedule
from fp4compile.codegen import ops
from fp4compile.codegen.errors import Fp4CompileError
from fp4compile.codegen.formats import QuantConfig, round_up
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.target import target_of
from fp4compile.passes.base import Pass
from fp4compile.passes.lower_convolutions import LowerConvolutions
from fp4compile.passes.pipeline import ANALYSIS, run
from fp4compile.passes.record import GraphRecord
from fp4compile.passes.site import Operand, OperandKind, Plan, Site, plan_of, site_of
from fp4compile.policy.rule import Policy

aten, prims = torch.ops.aten, torch.ops.prims
PASSES: Final[tuple[Pass, ...]] = (*ANALYSIS, LowerConvolutions())  # afterwards each planned site is a product of two matrices
_FIRST_FACTOR: Final[Mapping[object, int]] = {aten.addmm.default: 1}  # position of the left factor; the right one follows

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
class Call:
    """One planned matmul about to run: A (..., M, K) times B (..., K, N), plus a bias, or grouped by offsets."""

    site: Site
    plan: Plan
    a: Tensor
    b: Tensor
    extra: Tensor | None
    exact: Callable[[], Tensor]  # the operator itself
    weights: dict[tuple[str, str, str], Packed]

    @property
    def grouped(self) -> bool:
        return self.site.op == "_grouped_mm"

    def quantized(self) -> Tensor:
        """The product as the policy has it."""
        left = self._operand(self.a, self.site.lhs, self.plan.lhs, -1)
        right = self._operand(self.b, self.site.rhs, self.plan.rhs, -2)
        function = ops.SCALED_GROUPED_MM if self.grouped else ops.SCALED_MM
        return function(*left, *right, self.extra, self.a.shape[-1], self.site.dtype)

    def differences(self) -> tuple[Tensor | None, Tensor | None]:
        """What quantizing A alone and B alone adds to the result, float32 (..., M, N); None for an operand that stays."""
        a, b = self._rows(self.a, -1), self._rows(self.b, -2)
        of_a = of_b = None
        if self.plan.lhs is not None:
            of_a = self._times(self._error(a, self._packed(self.a, self.site.lhs, self.plan.lhs, -1)), b)
        if self.plan.rhs is not None:
            of_b = self._times(a, self._error(b, self._packed(self.b, self.site.rhs, self.plan.rhs, -2)))
        return of_a, of_b

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        """A (..., M, K) times B (..., N, K) transposed."""
        if self.grouped:
            return ops.SCALED_GROUPED_MM(a, None, None, b, None, None, self.extra, a.shape[-1], torch.float32)
        return a @ b.mT

    def _rows(self, x: Tensor, axis: int) -> Tensor:
        """float32 with K last, padded and rotated as quantizing does it."""
        configs = [config for config in (self.plan.lhs, self.plan.rhs) if config is not None]
        k, rotation = self.a.shape[-1], max(config.hadamard for config in configs)
        rows = F.pad((x if axis == -1 else x.mT), (0, round_up(k, max(config.k_multiple for config in configs)) - k))
        return (ops.HADAMARD(rows, -1, rotation) if rotation else rows).float()

    def _error(self, rows: Tensor, packed: Packed) -> Tensor:
        values = dequantize_ref(*packed)
        return F.pad(values, (0, rows.shape[-1] - values.shape[-1])) - rows

    def _operand(self, x: Tensor, operand: Operand | None, config: QuantConfig | None, axis: int) -> Packed | tuple[Tensor, None, None]:
        if config is not None:
            return self._packed(x, operand, config, axis)
        other = self.plan.lhs or self.plan.rhs
        rotation = other.hadamard if other is not None else 0
        rows = x if axis == -1 else x.mT
        return (ops.HADAMARD(rows, -1, rotation) if rotation else rows), None, None

    def _packed(self, x: Tensor, operand: Operand | None, config: QuantConfig, axis: int) -> Packed:
        """`x` quantized along `axis`; a weight once for all calls."""
        if operand is None or operand.kind is not OperandKind.WEIGHT:
            return ops.QUANTIZE(x, axis, *ops.quantize_args(config), None)
        key = (self.site.name, operand.parameter, config.describe())
        if key not in self.weights:
            self.weights[key] = ops.QUANTIZE(x, axis, *ops.quantize_args(config), None, **ops.quantize_keywords(config))
        return self.weights[key]


class PlannedModel:
    """`model` under `policy`. Each graph is captured at its first call; what its planned sites compute is chosen call by call."""

    def __init__(self, model: Callable[..., Any], policy: Policy) -> None:
        self.model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.policy = policy
        self.record: GraphRecord | None = None  # of the graph captured last
        self._instrumented = handoff.compile_apart(self.model, self._backend)
        self._weights: dict[tuple[str, str, str], Packed] = {}
        self._product: Product = exactly
        self._grad = False

    def __call__(self, batch: Batch, product: Product, *, grad: bool = False) -> Any:
        """Outputs for `batch` where every planned site computes `product(call)`; all other operators are the model's own.

        grad: results that require a gradient keep their history; parameters and inputs take no part in it. Raises `ModelTrains`.
        """
        if isinstance(self.model, nn.Module) and self.model.training:
            raise ModelTrains
        self._product, self._grad = product, grad
        with torch.no_grad():
            return call_with(self._instrumented, batch)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        names, buffers = capture.parameter_names(gm, example_inputs), capture.buffer_positions(gm)
        target = target_of(capture.device_of(example_inputs), where="sensitivity")
        record = GraphRecord(id=capture.compile_id(), training=False, target=target.name, policy=self.policy.name)
        step = follow_schedule(self.policy)

        def plan(joint: fx.GraphModule) -> None:
            run(joint, context_of(joint, self.policy, step, record, parameters=names, buffers=buffers)[0], PASSES)

        self.record = record
        return handoff.trace_only(gm, example_inputs, transform=plan, fingerprint="sensitivity", runner=self._runner)

    def _runner(self, gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
        def call(args: list[Any]) -> Any:
            with torch.set_grad_enabled(self._grad):
                inputs = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
                return _Running(gm, self._product, self._weights).run(*inputs)

        return call


class _Running(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, product: Product, weights: dict[tuple[str, str, str], Packed]) -> None:
        super().__init__(gm)
        self.product, self.weights = product, weights

    def run_node(self, n: fx.Node) -> Any:
        site, plan = site_of(n), plan_of(n)
        if n.target is aten.view.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return aten.reshape.default(*args)  # the graph was traced for compiled strides; eager results may lie otherwise
        if n.target is prims.convert_element_type.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return args[0].to(args[1])  # the operator itself has no derivative
        if torch.is_grad_enabled() and (at := _LOG_SUM_EXP.get(n.target)) is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.call_function(n.target, (*args[:at], True, *args[at + 1 :]), kwargs)
        if n.op != "call_function" or site is None or plan is None or not plan.quantizes:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        first = _FIRST_FACTOR.get(n.target, 0)
        a, b, *others = args[first:]
        extra = args[0] if first else others[0] if n.target is aten._grouped_mm.default else None
        exact = super().run_node
        return self.product(Call(site=site, plan=plan, a=a, b=b, extra=extra, exact=lambda: exact(n), weights=self.weights))


def exactly(call: Call) -> Tensor:
    """In high precision."""
    return call.exact()


def call_with(function: Callable[..., Any], batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple) else function(batch)

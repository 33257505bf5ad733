"""Host side of the kernels: the CUDA implementations of the `fp4::` operators. Checks, shapes, strides, allocation, grids.

Nothing here waits for the device. Results are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernels.kernel_call import on_device
from fp4compile.codegen.kernels.launch_dequantize import decoded as dequantize
from fp4compile.codegen.kernels.launch_matmul import Operand, multiply, multiply_grouped
from fp4compile.codegen.kernels.launch_native import scaled_mm as native_scaled_mm
from fp4compile.codegen.kernels.launch_native import serves
from fp4compile.codegen.kernels.launch_native_grouped import scaled_grouped_mm as native_scaled_grouped_mm
from fp4compile.codegen.kernels.launch_quantize import hadamard, quantize
from fp4compile.codegen.kernels.launch_quantize_both import quantize_both
from fp4compile.codegen.kernels.launch_runs import multiply_runs
from fp4compile.codegen.kernels.launch_weight import multiply_expert_weights, multiply_weight, serves_weight
from fp4compile.codegen.reference.layout import plain_ref
from fp4compile.codegen.reference.runs import is_by_runs
from fp4compile.codegen.target import known_target, processors_of

__all__ = ["dequantize", "hadamard", "quantize", "quantize_both", "scaled_grouped_mm", "scaled_mm"]


def scaled_mm(
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    bias: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
    *,
    a_layout: str = Layout.PLAIN,
    b_layout: str = Layout.PLAIN,
) -> Tensor:
    """`fp4::scaled_mm`: see `reference.matmul.scaled_mm_ref`; the batch dimensions are those of `a`."""
    where = "fp4::scaled_mm"
    target = known_target(a.device, where=where)
    by_runs = is_by_runs(a, a_global) or is_by_runs(b, b_global)
    if not by_runs and serves(a_scales, b_scales, (a_layout, b_layout), int(k), target.capability):
        with on_device(a):
            return native_scaled_mm(
                a, a_scales, a_global, b, b_scales, b_global, bias, int(k), out_dtype,
                a_layout=a_layout, b_layout=b_layout, capability=target.capability, processors=processors_of(a.device),
            )  # fmt: skip
    if not by_runs and serves_weight(a, a_scales, b, b_scales, (a_layout, b_layout), int(k), target.capability):
        with on_device(a):
            return multiply_weight(a, a_scales, a_global, b, b_scales, b_global, bias, int(k), out_dtype)  # type: ignore[arg-type]
    if a_scales is not None:
        a, a_scales = plain_ref(a, a_scales, a_layout)
    if b_scales is not None:
        b, b_scales = plain_ref(b, b_scales, b_layout)
    out = a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)
    if not out.numel():
        return out
    if by_runs:
        with on_device(a):
            multiply_runs(a, a_scales, a_global, b, b_scales, b_global, bias, out, int(k))
        return out
    batch = a.shape[:-2]
    if bias is not None:
        bias = bias.expand(out.shape)
    if b.ndim == 2 and (a_global is None or a_global.ndim == a.ndim - 1):
        # One B for all: the rows of every matrix of A are alike, and fill tiles better as one matrix.
        a, a_scales = a.flatten(0, -2), None if a_scales is None else a_scales.flatten(0, -2)
        a_global = None if a_global is None else a_global.flatten()
        batch = torch.Size(())
    left, right = Operand.of(a, a_scales, a_global, batch, where), Operand.of(b, b_scales, b_global, batch, where)
    flat = (batch.numel(), a.shape[-2], b.shape[-2])
    with on_device(a):
        multiply(left, right, None if bias is None else bias.reshape(flat), out.view(flat), int(k), target.capability)
    return out


def scaled_grouped_mm(
    a: Tensor,
    a_scales: Tensor | None,
    a_global: Tensor | None,
    b: Tensor,
    b_scales: Tensor | None,
    b_global: Tensor | None,
    offs: Tensor,
    k: int,
    out_dtype: torch.dtype,
    *,
    a_layout: str = Layout.PLAIN,
    b_layout: str = Layout.PLAIN,
) -> Tensor:
    """`fp4::scaled_grouped_mm`: see `reference.grouped.scaled_grouped_mm_ref`; `offs` is read on the device only."""
    where = "fp4::scaled_grouped_mm"
    target = known_target(a.device, where=where)
    if serves(a_scales, b_scales, (a_layout, b_layout), int(k), target.capability):
        with on_device(a):
            return native_scaled_grouped_mm(
                a, a_scales, a_global, b, b_scales, b_global, offs, int(k), out_dtype,
                a_layout=a_layout, b_layout=b_layout, capability=target.capability,
            )  # fmt: skip
    if serves_weight(a, a_scales, b, b_scales, (a_layout, b_layout), int(k), target.capability, groups=True):
        with on_device(a):
            return multiply_expert_weights(a, a_scales, a_global, b, b_scales, b_global, offs, int(k), out_dtype)  # type: ignore[arg-type]
    if a_scales is not None:
        a, a_scales = plain_ref(a, a_scales, a_layout)
    if b_scales is not None:
        b, b_scales = plain_ref(b, b_scales, b_layout)
    out = a.new_empty((a.shape[0], b.shape[-2]), dtype=out_dtype)
    if not out.numel():
        return out
    left, right = Operand.of(a, a_scales, a_global, torch.Size(()), where), Operand.of(b, b_scales, b_global, b.shape[:1], where)
    with on_device(a):
        multiply_grouped(left, right, offs, out, int(k))
    return out

"""The `fp4::` operators that passes put into a graph: schema, shapes, and one implementation per device.

All are functional. Stochastic rounding is a function of its `seed` argument, so the operators themselves are pure and a compiler may
save or move them freely; that a seed is never used twice is the passes' duty. A `Layout` other than "plain" changes where codes and
scales lie, never their values: whoever sets it on `quantize` sets it on every product that reads them.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fp4compile.codegen.cpu import launch as cpu
from fp4compile.codegen.formats import FORMATS, RUN, GlobalScale, QuantConfig, Signs, Source, round_up
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.layout import laid_out_shapes, lay_out_ref, plain_ref, rows_of
from fp4compile.codegen.reference.runs import rows_as_runs, runs_as_rows
from fp4compile.codegen.statistics import quantize_calibrated

_LIB = Library("fp4", "DEF")
# flexible_layout: every implementation reads strides, so Inductor never has to copy an input into another layout.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_OPERANDS = "Tensor a, Tensor? a_scales, Tensor? a_global, Tensor b, Tensor? b_scales, Tensor? b_global"
_LAYOUTS = "*, str a_layout='plain', str b_layout='plain'"
_LIB.define(
    "quantize(Tensor x, int axis, str format, str block, str scale_rule, str global_scale, str rounding, int hadamard,"
    " float? static_amax=None, Tensor? seed=None, *, str layout='plain', str calibration='')"
    " -> (Tensor codes, Tensor scales, Tensor global_scale)",
    tags=_TAGS,
)
# Two configurations, of the copy along the rows and of the copy along the columns: `quantize_both_args`.
_BOTH = ", ".join(
    f"str {side}_format, str {side}_block, str {side}_scale_rule, str {side}_global_scale, str {side}_rounding, int {side}_hadamard,"
    f" float? {side}_static_amax"
    for side in ("row", "column")
)
_LIB.define(
    f"quantize_both(Tensor x, {_BOTH}, Tensor? row_seed=None, Tensor? column_seed=None,"
    " *, str row_layout='plain', str column_layout='plain')"
    " -> (Tensor codes, Tensor scales, Tensor global_scale, Tensor codes_t, Tensor scales_t, Tensor global_scale_t)",
    tags=_TAGS,
)
_LIB.define(f"scaled_mm({_OPERANDS}, Tensor? bias, SymInt k, ScalarType out_dtype, {_LAYOUTS}) -> Tensor", tags=_TAGS)
_LIB.define(f"scaled_grouped_mm({_OPERANDS}, Tensor offs, SymInt k, ScalarType out_dtype, {_LAYOUTS}) -> Tensor", tags=_TAGS)
_LIB.define("hadamard(Tensor x, int axis, int size) -> Tensor", tags=_TAGS)
_LIB.define("dequantize(Tensor codes, Tensor scales, Tensor global_scale, SymInt k, ScalarType dtype) -> Tensor", tags=_TAGS)

QUANTIZE: Final = torch.ops.fp4.quantize.default
QUANTIZE_BOTH: Final = torch.ops.fp4.quantize_both.default
SCALED_MM: Final = torch.ops.fp4.scaled_mm.default
SCALED_GROUPED_MM: Final = torch.ops.fp4.scaled_grouped_mm.default
HADAMARD: Final = torch.ops.fp4.hadamard.default
DEQUANTIZE: Final = torch.ops.fp4.dequantize.default


def quantize_args(config: QuantConfig) -> tuple[object, ...]:
    """The operator arguments, after `x` and `axis`, that spell `config`."""
    c = config
    assert c.signs is Signs.FIXED, "random signs are a product in front of the operator"
    assert c.source is Source.ORIGINAL, "what the forward multiplied with is a value like others"
    return (c.format, str(c.block), str(c.scale_rule), str(c.global_scale), str(c.rounding), c.hadamard, c.static_amax)


def quantize_keywords(config: QuantConfig) -> dict[str, str]:
    """The keyword arguments that spell the rest of `config`: whose statistics it goes by."""
    return {"calibration": config.calibration} if config.calibration else {}


def quantize_both_args(row: QuantConfig, column: QuantConfig) -> tuple[object, ...]:
    """The operator arguments, after `x`, that spell a quantization along the last axis and one along the last but one."""
    return (*quantize_args(row), *quantize_args(column))


@functools.cache
def config_of(*args: object) -> QuantConfig:
    """The inverse of `quantize_args`; whose statistics a calibrated weight goes by is an argument of the operator for itself."""
    fields = ("format", "block", "scale_rule", "global_scale", "rounding", "hadamard", "static_amax")
    given: dict[str, Any] = dict(zip(fields, args, strict=True))
    lonely = given["global_scale"] == GlobalScale.STATIC and given["static_amax"] is None
    return QuantConfig(**given, calibration="" if lonely else "of the call")


@register_fake("fp4::quantize", lib=_LIB)
def _quantize_fake(
    x, axis, format, block, scale_rule, global_scale, rounding, hadamard, static_amax=None, seed=None, *, layout="plain", calibration=""
):
    fmt = FORMATS[format]
    rows, k = (x.shape[-2], x.shape[-1]) if axis == -1 else (x.shape[-1], x.shape[-2])
    batch = x.shape[:-2]
    padded = round_up(k, config_of(format, block, scale_rule, global_scale, rounding, hadamard, static_amax).k_multiple)
    numbers = {GlobalScale.ROW: (rows,), GlobalScale.RUN: (rows, padded // RUN)}.get(global_scale, ())
    codes, scales = laid_out_shapes(rows, padded // 2, padded // fmt.block, layout)
    return (
        x.new_empty((*batch, *codes), dtype=torch.uint8),
        x.new_empty((*batch, *scales), dtype=fmt.scale_dtype),
        x.new_empty((*batch, *numbers), dtype=torch.float32),
    )


@register_fake("fp4::quantize_both", lib=_LIB)
def _quantize_both_fake(x, *args, row_layout="plain", column_layout="plain"):
    row, column, _, _ = _halves(args)
    return (*_quantize_fake(x, -1, *row, layout=row_layout), *_quantize_fake(x, -2, *column, layout=column_layout))


def _halves(args):
    """(row's and column's arguments as `quantize_args` has them, row's and column's seed) of `fp4::quantize_both` after `x`."""
    row_seed, column_seed = (*args[14:], None, None)[:2]
    return args[:7], args[7:14], row_seed, column_seed


@register_fake("fp4::scaled_mm", lib=_LIB)
def _scaled_mm_fake(a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype, *, a_layout="plain", b_layout="plain"):
    return a.new_empty((*a.shape[:-1], rows_of(b, b_layout)), dtype=out_dtype)


@register_fake("fp4::scaled_grouped_mm", lib=_LIB)
def _scaled_grouped_mm_fake(a, a_scales, a_global, b, b_scales, b_global, offs, k, out_dtype, *, a_layout="plain", b_layout="plain"):
    return a.new_empty((a.shape[0], rows_of(b, b_layout)), dtype=out_dtype)


@register_fake("fp4::hadamard", lib=_LIB)
def _hadamard_fake(x, axis, size):
    shape = list(x.shape)
    shape[axis] = round_up(shape[axis], size)
    return x.new_empty(shape)


@register_fake("fp4::dequantize", lib=_LIB)
def _dequantize_fake(codes, scales, global_scale, k, dtype):
    return codes.new_empty((*codes.shape[:-1], k), dtype=dtype)


# For passes that add many nodes: the fake implementations themselves, several times cheaper than dispatching the operator.
SHAPE_RULES: Final = {
    QUANTIZE: _quantize_fake,
    QUANTIZE_BOTH: _quantize_both_fake,
    SCALED_MM: _scaled_mm_fake,
    SCALED_GROUPED_MM: _scaled_grouped_mm_fake,
    HADAMARD: _hadamard_fake,
    DEQUANTIZE: _dequantize_fake,
}


def _or_offline(by_kernel):
    """`fp4::quantize` of one device: what no kernel computes, a search that runs once a weight, is plain PyTorch on every device.

    Runs of rows with scales of their own are rows to every kernel.
    """

    def call(
        x, axis, format, block, scale_rule, global_scale, rounding, hadamard, static_amax=None, seed=None, *, layout="plain", calibration=""
    ):
        fields = (format, block, scale_rule, global_scale, rounding, hadamard, static_amax)
        config = config_of(*fields)
        if config.by_runs:
            rows = (format, block, scale_rule, str(GlobalScale.ROW), rounding, hadamard, static_amax)
            codes, scales, decode = call(runs_as_rows(x, axis), -1, *rows, seed)
            codes, scales, decode = rows_as_runs(codes, scales, decode, x, axis)
            return *lay_out_ref(codes, scales, layout), decode
        if not config.is_offline:
            return by_kernel(x, axis, *fields, seed, layout=layout)
        if config.needs_moments:
            codes, scales, decode = quantize_calibrated(x if axis == -1 else x.mT, config, calibration)
        else:
            codes, scales, decode = quantize_ref(x, config, axis=axis)
        return *lay_out_ref(codes, scales, layout), decode

    return call


def _quantize_cpu(x, axis, format, block, scale_rule, global_scale, rounding, hadamard, static_amax=None, seed=None, *, layout="plain"):
    config = config_of(format, block, scale_rule, global_scale, rounding, hadamard, static_amax)
    codes, scales, decode = cpu.quantize(x, config, axis=axis, seed=seed)
    return *lay_out_ref(codes, scales, layout), decode


def _quantize_both(one_reading):
    """`fp4::quantize_both` of one device: two quantizations, but for `one_reading`, where given, of what kernels compute."""

    def call(x, *args, row_layout="plain", column_layout="plain"):
        row, column, row_seed, column_seed = _halves(args)
        if one_reading is not None and not any(config.is_offline or config.by_runs for config in (config_of(*row), config_of(*column))):
            return one_reading(x, row, column, row_seed, column_seed, row_layout, column_layout)
        along = QUANTIZE(x, -1, *row, row_seed, layout=row_layout)
        return (*along, *QUANTIZE(x, -2, *column, column_seed, layout=column_layout))

    return call


def _product_cpu(multiply):
    """No kernel of the CPU reads another layout than the plain one."""

    def call(a, a_scales, a_global, b, b_scales, b_global, extra, k, out_dtype, *, a_layout="plain", b_layout="plain"):
        a, a_scales = plain_ref(a, a_scales, a_layout)
        b, b_scales = plain_ref(b, b_scales, b_layout)
        return multiply(a, a_scales, a_global, b, b_scales, b_global, extra, k, out_dtype)

    return call


def _dequantize(codes: Tensor, scales: Tensor, global_scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """One rounding to `dtype`."""
    return dequantize_ref(codes, scales, global_scale)[..., :k].to(dtype).contiguous()


def _hadamard_cpu(x: Tensor, axis: int, size: int) -> Tensor:
    return cpu.hadamard(x, size) if axis == -1 else cpu.hadamard(x.mT, size).mT.contiguous()


_LIB.impl("quantize", _or_offline(_quantize_cpu), "CPU")
_LIB.impl("quantize_both", _quantize_both(None), "CPU")
_LIB.impl("scaled_mm", _product_cpu(cpu.scaled_mm), "CPU")
_LIB.impl("scaled_grouped_mm", _product_cpu(cpu.scaled_grouped_mm), "CPU")
_LIB.impl("hadamard", _hadamard_cpu, "CPU")
_LIB.impl("dequantize", _dequantize, "CPU")


def _on_cuda(name: str):
    """CUDA implementations live with the Triton kernels, which are imported when the first one runs."""

    def call(*args, **kwargs):
        from fp4compile.codegen.kernels import launch

        return getattr(launch, name)(*args, **kwargs)

    return call


_LIB.impl("quantize", _or_offline(_on_cuda("quantize")), "CUDA")
_LIB.impl("quantize_both", _quantize_both(_on_cuda("quantize_both")), "CUDA")
for _name in ("scaled_mm", "scaled_grouped_mm", "hadamard", "dequantize"):
    _LIB.impl(_name, _on_cuda(_name), "CUDA")

"""The two `fp4::` operators of ARCQuant (arXiv 2601.07475): an activation with residuals of its outliers, a weight with them twice.

`quantize_residual(x, order, outliers)` and `quantize_repeated(w, order, outliers)` quantize along K in one order, that of a calibration,
and interleave what K gains: `reference/residual.py` says how. Their product is an ordinary `fp4::scaled_mm` over the wider K. `order` is
int32 and lies on the device of the operand: a permutation of channels, or of whole blocks, which are read like x itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library, register_fake

from fp4compile.codegen import ops
from fp4compile.codegen.cpu import launch as cpu
from fp4compile.codegen.formats import GlobalScale, QuantConfig, round_up
from fp4compile.codegen.reference.layout import laid_out_shapes, lay_out_ref
from fp4compile.codegen.reference.residual import in_order_ref, repeated_ref, with_residual_ref
from fp4compile.codegen.statistics import quantize_calibrated

Quantized = tuple[Tensor, Tensor, Tensor]
_Implementation = Callable[[Tensor, int, Tensor, int, QuantConfig, str, str], Quantized]

_LIB = Library("fp4", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_CONFIG = "str format, str block, str scale_rule, str global_scale, str rounding, int hadamard, float? static_amax=None"
_FIELDS = 7  # of a configuration, of which the dispatcher leaves out the last where it is None
for _name, _keywords in (("quantize_residual", "str layout='plain'"), ("quantize_repeated", "str layout='plain', str calibration=''")):
    _LIB.define(
        f"{_name}(Tensor x, int axis, Tensor order, int outliers, {_CONFIG}, *, {_keywords})"
        " -> (Tensor codes, Tensor scales, Tensor global_scale)",
        tags=_TAGS,
    )

QUANTIZE_RESIDUAL: Final = torch.ops.fp4.quantize_residual.default
QUANTIZE_REPEATED: Final = torch.ops.fp4.quantize_repeated.default
WIDENED: Final = (QUANTIZE_RESIDUAL, QUANTIZE_REPEATED)


def _from_dispatcher(implementation: _Implementation) -> Callable[..., Quantized]:
    def call(
        x: Tensor, axis: int, order: Tensor, outliers: int, *fields: Any, layout: str = "plain", calibration: str = ""
    ) -> Quantized:  # fmt: skip
        return implementation(x, axis, order, outliers, ops.config_of(*(*fields, None)[:_FIELDS]), layout, calibration)

    return call


def _shapes(x: Tensor, axis: int, order: Tensor, outliers: int, config: QuantConfig, layout: str, calibration: str) -> Quantized:
    rows, k = (x.shape[-2], x.shape[-1]) if axis == -1 else (x.shape[-1], x.shape[-2])
    wide = round_up(k, config.fmt.block) + outliers
    codes, scales = laid_out_shapes(rows, wide // 2, wide // config.fmt.block, layout)
    per_row = (rows,) if config.global_scale is GlobalScale.ROW else ()
    return (
        x.new_empty((*x.shape[:-2], *codes), dtype=torch.uint8),
        x.new_empty((*x.shape[:-2], *scales), dtype=config.fmt.scale_dtype),
        x.new_empty((*x.shape[:-2], *per_row), dtype=torch.float32),
    )


def _residual_on_cpu(x: Tensor, axis: int, order: Tensor, outliers: int, config: QuantConfig, layout: str, _: str) -> Quantized:
    """All channels by the C++ kernel; what it lost of a few, in plain PyTorch."""
    x = in_order_ref(x, order, config, axis=axis)
    codes, scales, decode = cpu.quantize(x, config)
    codes, scales = with_residual_ref(x.float(), codes, scales, decode, outliers, config)
    return *lay_out_ref(codes, scales, layout), decode


def _residual_on_cuda(x: Tensor, axis: int, order: Tensor, outliers: int, config: QuantConfig, layout: str, _: str) -> Quantized:
    """The launcher lives with the Triton kernels, which are imported when the first one runs."""
    from fp4compile.codegen.kernels.launch_residual import quantize_residual

    return quantize_residual(x, axis, order, outliers, config, layout)


def _repeated(w: Tensor, axis: int, order: Tensor, outliers: int, config: QuantConfig, layout: str, calibration: str) -> Quantized:
    """Once a weight, so on every device a few copies around the device's own quantizer, whatever its scale rule is.

    Raises what `quantize_calibrated` raises.
    """
    if config.needs_moments:
        codes, scales, decode = quantize_calibrated(w if axis == -1 else w.mT, config, calibration, order)
    else:
        codes, scales, decode = ops.QUANTIZE(in_order_ref(w, order, config, axis=axis), -1, *ops.quantize_args(config))
    return *lay_out_ref(*repeated_ref(codes, scales, outliers, config), layout), decode


for _operator in WIDENED:
    register_fake(_operator.name(), _from_dispatcher(_shapes), lib=_LIB)
_LIB.impl("quantize_residual", _from_dispatcher(_residual_on_cpu), "CPU")
_LIB.impl("quantize_residual", _from_dispatcher(_residual_on_cuda), "CUDA")
for _device in ("CPU", "CUDA"):
    _LIB.impl("quantize_repeated", _from_dispatcher(_repeated), _device)

"""A weight quantized for the inputs that its layer sees: the public face of `reference/gptq.py` and `reference/local_hessian.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from torch import Tensor

from fp4compile.codegen.errors import UnknownName
from fp4compile.codegen.formats import QuantConfig, Rounding, ScaleRule
from fp4compile.codegen.qtensor import QTensor
from fp4compile.codegen.statistics import quantize_by_moments

METHODS: Final = ("gptq", "local_hessian", "gptq_local_hessian")


def second_moments(inputs: Tensor) -> Tensor:
    """Mean of x x^T over the rows of `inputs` (..., K), float32 (K, K): what the methods below need."""
    rows = inputs.flatten(0, -2).float()
    return rows.mT @ rows / max(rows.shape[0], 1)


def quantize_for_inputs(weight: Tensor, moments: Tensor, config: QuantConfig, *, method: str = "gptq", damping: float = 0.01) -> QTensor:
    """`weight` (N, K) as an ordinary quantized tensor, chosen so that the layer's output changes least.

    moments: E[x x^T] (K, K) of the layer's inputs; for "local_hessian" its diagonal blocks (ceil(K/16), 16, 16) are enough.
    method: "gptq" chooses codes under the scales of `config`; "local_hessian" chooses scales (`config.scale_rule` is then "sweep");
    "gptq_local_hessian" both. Raises `UnknownName` or `UnusableMoments`.
    """
    if method not in METHODS:
        raise UnknownName(what="method", found=method, valid=METHODS, where="quantize_for_inputs")
    rule = config.scale_rule if method == "gptq" else ScaleRule.LOCAL_HESSIAN
    rounding = Rounding.NEAREST if method == "local_hessian" else Rounding.GPTQ
    chosen = replace(config, scale_rule=rule, rounding=rounding, calibration="of the caller")
    codes, scales, decode = quantize_by_moments(weight, moments, chosen, damping)
    shown = config if method == "gptq" else replace(config, scale_rule=ScaleRule.SWEEP)
    return QTensor(codes=codes, scales=scales, global_scale=decode, config=shown, shape=weight.shape, dtype=weight.dtype)

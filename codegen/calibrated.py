"""A weight quantized for the inputs that its layer sees: the public face of `reference/gptq.py` and `reference/local_hessian.py`."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from fp4compile.codegen.errors import UnknownName
from fp4compile.codegen.formats import QuantConfig, ScaleRule
from fp4compile.codegen.qtensor import QTensor
from fp4compile.codegen.reference.gptq import gptq_ref
from fp4compile.codegen.reference.local_hessian import local_hessian_ref

METHODS: Final = ("gptq", "local_hessian", "gptq_local_hessian")


def second_moments(inputs: Tensor) -> Tensor:
    """Mean of x x^T over the rows of `inputs` (..., K), float32 (K, K): what the methods below need."""
    rows = inputs.flatten(0, -2).float()
    return rows.mT @ rows / max(rows.shape[0], 1)


def quantize_for_inputs(weight: Tensor, moments: Tensor, config: QuantConfig, *, method: str = "gptq", damping: float = 0.01) -> QTensor:
    """`weight` (N, K) as an ordinary quantized tensor, chosen so that the layer's output changes least.

    moments: E[x x^T] (K, K) of the layer's inputs. method: "gptq" chooses codes under the scales of `config`; "local_hessian" chooses
    scales (`config.scale_rule` is then "sweep"); "gptq_local_hessian" both. Raises `UnknownName` or `UnusableMoments`.
    """
    if method not in METHODS:
        raise UnknownName(what="method", found=method, valid=METHODS, where="quantize_for_inputs")
    found = None
    if method != "gptq":
        swept = QuantConfig(
            format=config.format, block=config.block, scale_rule=ScaleRule.SWEEP,
            global_scale=config.global_scale, hadamard=config.hadamard, static_amax=config.static_amax,
        )  # fmt: skip
        found = local_hessian_ref(weight, moments, swept, damping=damping)
        config = swept
    if method != "local_hessian":
        found = gptq_ref(weight, moments, config, damping=damping, quantized=found)
    assert found is not None
    codes, scales, decode = found
    return QTensor(codes=codes, scales=scales, global_scale=decode, config=config, shape=weight.shape, dtype=weight.dtype)

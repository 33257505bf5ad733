"""What a quantized linear must give, computed from the reference numerics alone."""

from __future__ import annotations

import torch
from torch import nn

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.passes.assign_precision import AssignPrecision
from fp4compile.passes.find_matmuls import FindMatmuls
from fp4compile.passes.normalize import Normalize

BF16 = torch.bfloat16
SETUP = [Normalize(), FindMatmuls(), AssignPrecision()]
PLAIN, ROTATED = QuantConfig(), QuantConfig(hadamard=16)


def fake(x: torch.Tensor, config: QuantConfig = PLAIN) -> torch.Tensor:
    """float32 values that `x` takes when quantized along its last dimension; a linear sees one matrix, whatever the batch."""
    return dequantize_ref(*quantize_ref(x.flatten(0, -2), config))[:, : x.shape[-1]].view(x.shape)


def linear_ref(x: torch.Tensor, layer: nn.Linear, config: QuantConfig | None) -> torch.Tensor:
    """One rounding at the end, as the operator has it."""
    left = x.float() if config is None else fake(x, config)
    out = left @ fake(layer.weight, config or PLAIN).T
    return (out if layer.bias is None else out + layer.bias.float()).to(x.dtype)


def linear_ref_rotated(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """K = 40 is padded to 48 before it is rotated, on both sides."""
    out = dequantize_ref(*quantize_ref(x, ROTATED)) @ dequantize_ref(*quantize_ref(layer.weight, ROTATED)).T
    return (out if layer.bias is None else out + layer.bias.float()).to(x.dtype)

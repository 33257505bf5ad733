"""The same numbers without the compiler: a copy of a model whose decoder Linears compute on dequantized values, operator by operator.

What a compiled model must agree with. It shares nothing with the passes and the kernels, only the bit-exact quantizer of
`fp4compile.codegen.reference`; the matmul is plain float32 and the result is rounded to the model's dtype once.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref

# What the preset nvfp4 means, written out: a test compares them with the policy.
NVFP4_WEIGHT: Final = QuantConfig()
NVFP4_ACTIVATION: Final = QuantConfig()


class FakeQuantLinear(nn.Module):
    """`linear` on values that went through 4 bits: its weight (N, K) always, its input (..., K) where `activation` is given."""

    def __init__(self, linear: nn.Linear, weight: QuantConfig, activation: QuantConfig | None = None) -> None:
        super().__init__()
        self.weight = through_4_bits(linear.weight, weight)
        self.bias = None if linear.bias is None else linear.bias.float()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        values = x.float() if self.activation is None else through_4_bits(x.flatten(0, -2), self.activation).view(x.shape)
        return F.linear(values, self.weight, self.bias).to(x.dtype)


def through_4_bits(x: Tensor, config: QuantConfig) -> Tensor:
    """Float32 values of quantized and dequantized `x` (R, K), same shape."""
    return dequantize_ref(*quantize_ref(x, config))[..., : x.shape[-1]]


def fake_quantized(model: Any, weight: QuantConfig, activation: QuantConfig | None = None) -> Any:
    """A copy of a transformers model in which every Linear but the output head is a `FakeQuantLinear`."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    for name, linear in linears:
        model.set_submodule(name, FakeQuantLinear(linear, weight, activation))
    return model

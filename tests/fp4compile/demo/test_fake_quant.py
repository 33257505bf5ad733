"""The eager copy: one Linear against the reference product, a model whose head and embedding are as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from fp4compile.demo.fake_quant import NVFP4_ACTIVATION, NVFP4_WEIGHT, FakeQuantLinear, fake_quantized
from fp4compile.passes.site import OperandKind
from fp4compile.policy.load import load_policy
from tests.fp4compile.demo.tiny_llama import tiny_llama


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, QuantConfig(), QuantConfig(global_scale="row")], ids=["a16", "tensor", "row"])
def test_linear_is_the_reference_product(bias, activation):
    """K = 40 is no multiple of 16. Both sum in float32 and round to bf16 once; only where the global scale enters differs."""
    linear = nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 40, dtype=torch.bfloat16)
    rows = x.view(6, 40)
    left = (rows, None, None) if activation is None else quantize_ref(rows, activation)
    expected = scaled_mm_ref(*left, *quantize_ref(linear.weight, NVFP4_WEIGHT), linear.bias, 40, torch.bfloat16).view(2, 3, 24)
    found = FakeQuantLinear(linear, NVFP4_WEIGHT, activation)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)  # one bf16 step, where the float32 sums straddle a tie


def test_activations_matter():
    linear = nn.Linear(64, 24, bias=False)
    x = torch.randn(5, 64)
    assert not torch.allclose(FakeQuantLinear(linear, NVFP4_WEIGHT)(x), FakeQuantLinear(linear, NVFP4_WEIGHT, NVFP4_ACTIVATION)(x))


def test_every_linear_but_the_head_is_replaced_and_the_model_itself_is_not_touched():
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = fake_quantized(model, NVFP4_WEIGHT, NVFP4_ACTIVATION)
    replaced = [name for name, module in copied.named_modules() if isinstance(module, FakeQuantLinear)]
    assert len(replaced) == 2 * 7
    assert type(copied.lm_head) is nn.Linear
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_written_out_configs_are_the_preset():
    assert load_policy("nvfp4").base == {OperandKind.ACTIVATION: NVFP4_ACTIVATION, OperandKind.WEIGHT: NVFP4_WEIGHT}

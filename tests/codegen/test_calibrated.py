"""Weights quantized for their inputs, as users hold them."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.calibrated import METHODS, quantize_for_inputs, second_moments
from fp4compile.codegen.errors import UnknownName
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.qtensor import quantize


def _inputs(k: int = 96) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 500, 24, generator=g) @ torch.randn(24, k, generator=g) + 0.1 * torch.randn(3, 500, k, generator=g)


def test_second_moments_are_the_mean_outer_product():
    x = _inputs()
    rows = x.flatten(0, 1).double()
    assert torch.allclose(second_moments(x).double(), torch.einsum("ri,rj->ij", rows, rows) / 1500, rtol=1e-4, atol=1e-4)
    assert second_moments(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(format="mixfp4"), QuantConfig(hadamard=16)], ids=QuantConfig.describe)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_change_less_than_by_rounding(method: str, config: QuantConfig):
    x = _inputs()
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = quantize_for_inputs(weight, second_moments(x), config, method=method)
    plain = quantize(weight, config.format, scale_rule=str(found.config.scale_rule), hadamard=config.hadamard)
    error = [((q.dequantize(torch.float32) - weight.float()) @ x.flatten(0, 1).mT).norm() for q in (found, plain)]
    # These channels are alike in size, so scales alone win little.
    assert error[0] < (0.99 if method == "local_hessian" else 0.8) * error[1]
    assert found.dequantize().dtype == torch.bfloat16 and found.nbytes == plain.nbytes


def test_an_unknown_method_is_named():
    with pytest.raises(UnknownName, match="Did you mean 'gptq'"):
        quantize_for_inputs(torch.ones(16, 16), torch.eye(16), QuantConfig(), method="gtpq")

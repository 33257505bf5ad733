"""GPTQ and local-Hessian scales on correlated synthetic inputs: the error of the layer's output, against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.gptq import UnusableMoments, gptq_ref
from fp4compile.codegen.reference.local_hessian import local_hessian_ref

SWEEP = QuantConfig(scale_rule="sweep")
CONFIGS = (
    QuantConfig(), QuantConfig(scale_rule="four_over_six"), SWEEP, QuantConfig(scale_rule="soar"), QuantConfig(global_scale="row"),
    QuantConfig(block="16x16"), QuantConfig(hadamard=64), QuantConfig(format="mxfp4"),
    *(QuantConfig(format=name) for name in ("mixfp4", "if4", "nvint4")),
)  # fmt: skip
Quantized = tuple[Tensor, Tensor, Tensor]


def layer(n: int = 48, k: int = 192, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight (N, K), and moments (K, K) of inputs with a decaying spectrum and channels of very different size."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(k, k, generator=g))[0] * (torch.arange(1, k + 1) ** -0.6)[:, None]
    x = torch.randn(2048, k, generator=g) @ basis * torch.exp(torch.randn(k, generator=g))
    return torch.randn(n, k, generator=g) * 0.02, x.mT @ x / 2048


def output_error(weight: Tensor, moments: Tensor, quantized: Quantized, config: QuantConfig) -> float:
    """Share of the output's energy: tr(D H D^T) / tr(W H W^T)."""
    values = dequantize_ref(*quantized).double()
    if config.hadamard:
        from fp4compile.codegen.reference.hadamard import hadamard_ref

        rotation = hadamard_ref(torch.eye(values.shape[1]), config.hadamard).double()
        values = values @ rotation.mT
    difference, h, w = values[:, : weight.shape[1]] - weight, moments.double(), weight.double()
    return ((difference @ h * difference).sum() / (w @ h * w).sum()).item()


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
@pytest.mark.parametrize("by_activation", [True, False])
def test_gptq_beats_rounding_to_nearest_under_every_format(config: QuantConfig, by_activation: bool):
    weight, moments = layer(seed=1)
    nearest = output_error(weight, moments, quantize_ref(weight, config), config)
    found = output_error(weight, moments, gptq_ref(weight, moments, config, by_activation=by_activation), config)
    assert found < 0.45 * nearest


def test_columns_with_large_inputs_first_is_better():
    weight, moments = layer()
    first, natural = (output_error(weight, moments, gptq_ref(weight, moments, SWEEP, by_activation=b), SWEEP) for b in (True, False))
    assert first < 0.85 * natural


def test_scales_are_those_of_the_config():
    weight, moments = layer()
    for config in CONFIGS:
        _, scales, decode = gptq_ref(weight, moments, config)
        _, expected, expected_decode = quantize_ref(weight, config)
        assert torch.equal(scales.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(decode, expected_decode)


def test_without_correlations_gptq_rounds_to_nearest():
    weight, _ = layer()
    for config in (c for c in CONFIGS if not c.hadamard):
        codes = gptq_ref(weight, torch.eye(192), config)[0]
        assert torch.equal(codes, quantize_ref(weight, config)[0]), config.describe()


def test_local_hessian_scales_beat_the_plain_sweep():
    for config in (SWEEP, QuantConfig(format="mixfp4", scale_rule="sweep"), QuantConfig(scale_rule="sweep", block="16x16")):
        weight, moments = layer()
        plain = output_error(weight, moments, quantize_ref(weight, config), config)
        local = local_hessian_ref(weight, moments, config)
        assert output_error(weight, moments, local, config) < (0.97 if config.is_tile else 0.75) * plain
        both = gptq_ref(weight, moments, config, quantized=local)
        alone = gptq_ref(weight, moments, config)
        assert output_error(weight, moments, both, config) < (1.02 if config.is_tile else 0.9) * output_error(
            weight, moments, alone, config
        )


def test_local_hessian_with_equal_uncorrelated_inputs_is_the_sweep():
    weight, _ = layer()
    local, plain = local_hessian_ref(weight, torch.eye(192), SWEEP), quantize_ref(weight, SWEEP)
    assert (local[1].view(torch.uint8) != plain[1].view(torch.uint8)).float().mean() < 0.01  # sums in another order, at ties
    assert output_error(weight, torch.eye(192), local, SWEEP) == pytest.approx(output_error(weight, torch.eye(192), plain, SWEEP), rel=1e-4)


@pytest.mark.parametrize("method", [gptq_ref, local_hessian_ref])
def test_ragged_k_and_unused_inputs(method):
    weight, moments = layer(k=100)
    moments[:7], moments[:, :7] = 0, 0
    found = method(weight, moments, SWEEP)
    assert found[0].shape == (48, 56) and dequantize_ref(*found)[:, 100:].abs().sum() == 0
    nearest = output_error(weight, moments, quantize_ref(weight, SWEEP), SWEEP)
    assert output_error(weight, moments, found, SWEEP) < 0.8 * nearest


def test_a_block_that_is_not_finite_stays_so_and_spoils_no_other():
    weight, moments = layer()
    broken = weight.clone()
    broken[5, 40] = torch.nan
    values = dequantize_ref(*gptq_ref(broken, moments, SWEEP))
    assert values[5, 32:48].isnan().all() and values.isnan().sum() == 16
    assert torch.equal(values[:5], dequantize_ref(*gptq_ref(weight, moments, SWEEP))[:5])


@pytest.mark.parametrize(("moments", "said"), [
    (torch.eye(96), "have shape (96, 96); (192, 192) is needed"),
    (torch.zeros(192, 192), "nothing but zeros"),
    (torch.full((192, 192), torch.nan), "hold NaN"),
], ids=["shape", "zeros", "nan"])  # fmt: skip
@pytest.mark.parametrize("method", [gptq_ref, local_hessian_ref])
def test_unusable_moments_are_refused(method, moments: Tensor, said: str):
    with pytest.raises(UnusableMoments) as refused:
        method(layer()[0], moments, SWEEP)
    assert said in str(refused.value) and str(refused.value).startswith(("gptq: ", "local_hessian: "))

"""The scaled matrix product against float64 products of the exact dequantized values, and the order of its epilogue."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref

NVFP4, ROW, MXFP4 = QuantConfig(), QuantConfig(global_scale="row"), QuantConfig(format="mxfp4")
CONFIGS = {"nvfp4": NVFP4, "row": ROW, "mxfp4": MXFP4, "tile": QuantConfig(block="16x16"), "4/6": QuantConfig(scale_rule="four_over_six")}


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _exact(x: Tensor, config: QuantConfig | None, k: int) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor]:
    """The operand's three arguments, and its float64 value (..., R, k) before global scales times those scales."""
    if config is None:
        return (x, None, None), x.double()
    codes, scales, decode = quantize_ref(x, config)
    scale = decode.double()[..., None] if decode.ndim == x.ndim - 1 else decode.double()[..., None, None]
    return (codes, scales, decode), dequantize_ref(codes, scales).double()[..., :k] * scale


def _assert_near(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """fp32 sums of K products err below K eps sum|terms|; the output cast adds half an ulp."""
    exact = left @ right.mT + (0 if bias is None else bias.double())
    magnitude = left.abs() @ right.abs().mT + (0 if bias is None else bias.double().abs())
    bound = left.shape[-1] * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * exact.abs()
    assert out.dtype == dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("activation", [None, *CONFIGS])
@pytest.mark.parametrize("weight", CONFIGS)
@pytest.mark.parametrize("k", [16, 40, 100, 576])
def test_against_float64(activation: str | None, weight: str, k: int):
    a_args, left = _exact(_randn(9, k, seed=1), CONFIGS.get(activation or ""), k)
    b_args, right = _exact(_randn(21, k, seed=2), CONFIGS[weight], k)
    _assert_near(scaled_mm_ref(*a_args, *b_args, None, k, torch.float32), left, right, None, torch.float32)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_shape", [None, (21,), (9, 21)])
def test_weight_only_dtypes_and_bias(a_dtype: torch.dtype, out_dtype: torch.dtype, bias_shape: tuple[int, ...] | None):
    bias = None if bias_shape is None else _randn(*bias_shape, seed=3, dtype=torch.bfloat16)
    a_args, left = _exact(_randn(9, 72, seed=1, dtype=a_dtype), None, 72)
    b_args, right = _exact(_randn(21, 72, seed=2), NVFP4, 72)
    _assert_near(scaled_mm_ref(*a_args, *b_args, bias, 72, out_dtype), left, right, bias, out_dtype)


@pytest.mark.parametrize("config", [NVFP4, ROW, MXFP4], ids=QuantConfig.describe)
@pytest.mark.parametrize("quantized_activation", [True, False])
def test_batches_are_matrices_of_their_own(config: QuantConfig, quantized_activation: bool):
    a = _randn(3, 5, 40, seed=4) * torch.tensor([1.0, 1e3, 1e-3]).view(3, 1, 1)
    a_args, left = _exact(a, config if quantized_activation else None, 40)
    b_args, right = _exact(_randn(3, 7, 40, seed=5), config, 40)
    out = scaled_mm_ref(*a_args, *b_args, None, 40, torch.float32)
    _assert_near(out, left, right, None, torch.float32)
    if quantized_activation:
        alone = quantize_ref(a[1], config)
        assert torch.equal(a_args[0][1], alone[0])


def test_a_batched_activation_meets_one_weight():
    a_args, left = _exact(_randn(2, 3, 5, 48, seed=6), None, 48)
    b_args, right = _exact(_randn(7, 48, seed=7), NVFP4, 48)
    _assert_near(scaled_mm_ref(*a_args, *b_args, None, 48, torch.float32), left, right, None, torch.float32)


def test_sums_of_few_blocks_are_exact_and_the_epilogue_rounds_in_the_documented_order():
    """With K = 16 the accumulator is exact in float32, so the epilogue's four roundings can be computed one by one."""
    a, b = quantize_ref(_randn(64, 16, seed=8), ROW), quantize_ref(_randn(48, 16, seed=9), ROW)
    bias = _randn(48, seed=10)
    acc = (dequantize_ref(*a[:2]).double() @ dequantize_ref(*b[:2]).double().T).numpy()
    assert np.array_equal(acc, acc.astype(np.float32)), "exact in float32"
    alpha = a[2].numpy()[:, None] * b[2].numpy()[None, :]
    expected = acc.astype(np.float32) * alpha + bias.numpy()
    assert expected.dtype == np.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = scaled_mm_ref(*a, *b, bias, 16, dtype)
        assert torch.equal(out, torch.from_numpy(expected).to(dtype))


def test_the_product_is_not_rounded_to_the_output_dtype_before_alpha():
    a, b = quantize_ref(_randn(64, 16, seed=8), NVFP4), quantize_ref(_randn(64, 16, seed=9), NVFP4)
    alpha = a[2] * b[2]
    twice = ((dequantize_ref(*a[:2]) @ dequantize_ref(*b[:2]).T).bfloat16().float() * alpha).bfloat16()
    assert not torch.equal(scaled_mm_ref(*a, *b, None, 16, torch.bfloat16), twice)


def test_weight_only_pads_the_weight_not_the_activation():
    """K = 40 is padded to 48 in the codes; the 8 absent activations must not be read."""
    codes, scales, decode = quantize_ref(_randn(5, 40, seed=11), NVFP4)
    poisoned = codes.clone()
    poisoned[:, 20:] = 0x77
    a = _randn(3, 40, seed=12)
    clean = scaled_mm_ref(a, None, None, codes, scales, decode, None, 40, torch.float32)
    assert torch.equal(clean, scaled_mm_ref(a, None, None, poisoned, scales, decode, None, 40, torch.float32))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_activations_stay_visible_in_their_row(bad: float):
    a = _randn(4, 64, seed=13)
    a[1, 5] = bad
    a_args, _ = _exact(a, NVFP4, 64)
    b_args, _ = _exact(_randn(6, 64, seed=14), NVFP4, 64)
    out = scaled_mm_ref(*a_args, *b_args, None, 64, torch.bfloat16)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_non_finite_weights_stay_visible_in_their_column():
    w = _randn(6, 64, seed=15)
    w[2, 40] = math.nan
    b_args, _ = _exact(w, NVFP4, 64)
    out = scaled_mm_ref(_randn(4, 64, seed=16), None, None, *b_args, None, 64, torch.float32)
    assert out[:, 2].isnan().all()
    assert out[:, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 16), (5, 0, 16), (3, 5, 0)])
def test_empty_products(m: int, n: int, k: int):
    a_args, _ = _exact(_randn(m, k), NVFP4, k)
    b_args, _ = _exact(_randn(n, k), NVFP4, k)
    out = scaled_mm_ref(*a_args, *b_args, None, k, torch.float32)
    assert torch.equal(out, torch.zeros(m, n))


@pytest.mark.parametrize("config", [NVFP4, ROW, MXFP4], ids=QuantConfig.describe)
@pytest.mark.parametrize("quantized_activation", [True, False])
def test_grouped_product_is_one_product_a_group(config: QuantConfig, quantized_activation: bool):
    offs = torch.tensor([3, 3, 8], dtype=torch.int32)
    a_args, left = _exact(_randn(10, 40, seed=17), config if quantized_activation else None, 40)
    b_args, right = _exact(_randn(3, 7, 40, seed=18), config, 40)
    out = scaled_grouped_mm_ref(*a_args, *b_args, offs, 40, torch.float32)
    for group, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 8))):
        _assert_near(out[rows], left[rows], right[group], None, torch.float32)
    assert torch.equal(out[8:], torch.zeros(2, 7))

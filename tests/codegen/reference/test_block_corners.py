"""Corner values of the quantizer: each scale byte and its ties, golden vectors, zeros, extremes, Inf and NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import FP32_MAX, QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.e2m1 import unpack_ref
from tests.codegen import oracle

CANONICAL, FOUR_OVER_SIX, MXFP4 = QuantConfig(), QuantConfig(scale_rule="four_over_six"), QuantConfig(format="mxfp4")
UNIT = QuantConfig(global_scale="static", static_amax=2688.0)  # S = 1: scale bytes and codes can be read off the input


def _first(x: Tensor, config: QuantConfig = UNIT) -> tuple[list[int], list[int]]:
    """Codes of the first row and its scale bytes."""
    codes, scales, _ = quantize_ref(x, config)
    return unpack_ref(codes)[0].tolist(), scales.view(torch.uint8)[0].tolist()


def _block(*values: float) -> Tensor:
    x = torch.zeros(1, 16)
    x[0, : len(values)] = torch.tensor(values)
    return x


def test_every_scale_byte_is_reached_by_six_times_its_value():
    every = np.arange(0x7F, dtype=np.uint8)
    maxima = torch.from_numpy(oracle.e4m3_values(every) * 6)
    codes, scales, _ = quantize_ref(torch.nn.functional.pad(maxima[:, None], (0, 15)), UNIT)
    assert scales.view(torch.uint8)[:, 0].tolist() == every.tolist()
    assert unpack_ref(codes)[1:, 0].tolist() == [7] * 0x7E


def test_scale_bytes_at_each_midpoint_and_its_neighbours():
    """Expected bytes come from exact comparison of fl(b/6) with the midpoints, not from any cast."""
    values = oracle.e4m3_values(np.arange(0x7F, dtype=np.uint8)).astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    ulps = np.arange(-6, 7)
    bits = (middles * 6).astype(np.float32).view(np.int32)[:, None] + ulps
    maxima = bits.ravel().view(np.float32)
    t = (maxima * oracle.SIXTH).astype(np.float64)
    below = np.searchsorted(values, t, side="right") - 1
    above = np.minimum(below + 1, 0x7E)
    middle = (values[below] + values[above]) / 2
    expected = np.where(t > middle, above, np.where(t < middle, below, below + below % 2))
    assert (t == middle).sum() > 126, "each midpoint is hit exactly at least once"
    _, scales, _ = quantize_ref(torch.nn.functional.pad(torch.from_numpy(maxima)[:, None], (0, 15)), UNIT)
    assert scales.view(torch.uint8)[:, 0].tolist() == expected.tolist()


@pytest.mark.parametrize(("block_max", "element", "scale_byte", "code"), [
    (6 * 2**-7, 2**-7, 0x04, 2),
    (6 * 1.49 * 2**-9, 3 * 2**-9, 0x01, 5),
    (6 * 1.49 * 2**-9, 6 * 1.49 * 2**-9, 0x01, 7),  # scales to 8.94: saturates
    (6 * 0.5 * 2**-9, 0.0, 0x00, 0),  # a tie between 0 and the smallest subnormal
    (6 * 1.5 * 2**-9, 0.0, 0x02, 0),
    (6 * 2.5 * 2**-9, 0.0, 0x02, 0),
    (6.0, 1.0, 0x38, 2),
    (2688.0, 448.0, 0x7E, 2),
])  # fmt: skip
def test_golden_vectors(block_max: float, element: float, scale_byte: int, code: int):
    for sign in (1, -1):
        codes, scales = _first(_block(sign * block_max, sign * element))
        assert scales == [scale_byte]
        assert codes[1] == code + (8 if sign < 0 else 0)
        tensor_wide = torch.cat([_block(block_max, sign * element), _block(2688.0)])
        assert _first(tensor_wide, QuantConfig())[0][1] == codes[1]
        assert _first(tensor_wide, QuantConfig())[1] == [scale_byte]


@pytest.mark.parametrize("config", [
    CANONICAL, QuantConfig(global_scale="row"), QuantConfig(block="16x16"), FOUR_OVER_SIX, MXFP4,
], ids=QuantConfig.describe)  # fmt: skip
def test_zeros_are_exact_and_keep_their_sign(config: QuantConfig):
    x = torch.zeros(4, 64)
    x[1] = -0.0
    codes, scales, decode = quantize_ref(x, config)
    assert unpack_ref(codes)[0].tolist() == [0] * 64 and unpack_ref(codes)[1].tolist() == [8] * 64
    assert scales.view(torch.uint8).sum() == 0
    assert decode.unique().tolist() == [1.0]
    assert torch.equal(dequantize_ref(codes, scales, decode), x)


def test_a_zero_block_beside_others_is_exact_zero():
    x = torch.cat([torch.zeros(1, 16), torch.full((1, 16), 3.0)], dim=1)
    codes, scales, decode = quantize_ref(x, QuantConfig())
    assert scales.view(torch.uint8)[0, 0] == 0
    assert torch.equal(dequantize_ref(codes, scales, decode)[:, :16], torch.zeros(1, 16))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("config", [
    QuantConfig(), QuantConfig(global_scale="row"), QuantConfig(scale_rule="four_over_six"), QuantConfig(scale_rule="four_over_six_absmax"),
    UNIT, QuantConfig(format="mxfp4"),
], ids=QuantConfig.describe)  # fmt: skip
def test_a_non_finite_element_poisons_its_block_and_nothing_else(bad: float, config: QuantConfig):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[2, 33] = bad
    replaced = x.clone()
    replaced[2, 33] = 0.0
    codes, scales, decode = quantize_ref(x, config)
    expected_codes, expected_scales, expected_decode = quantize_ref(replaced, config)
    block = 33 // config.fmt.block
    poisoned = scales.view(torch.uint8)[2, block]
    assert poisoned == (0xFF if config.format == "mxfp4" else 0x7F)
    dequantized = dequantize_ref(codes, scales, decode).unflatten(-1, (-1, config.fmt.block))
    assert dequantized[2, block].isnan().all()
    keep = torch.ones(4, scales.shape[-1], dtype=torch.bool)
    keep[2, block] = False
    assert torch.equal(scales.view(torch.uint8)[keep], expected_scales.view(torch.uint8)[keep])
    assert torch.equal(decode, expected_decode)
    assert dequantized[keep].isfinite().all()
    expected = dequantize_ref(expected_codes, expected_scales, expected_decode).unflatten(-1, (-1, config.fmt.block))
    assert torch.equal(dequantized[keep], expected[keep])


def test_both_nan_signs_give_the_positive_nan_byte():
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32).item()
    for value in (math.nan, negative_nan):
        assert _first(_block(value))[1] == [0x7F]


def test_a_non_finite_element_poisons_its_whole_tile():
    x = torch.ones(32, 32)
    x[3, 20] = math.inf
    _, scales, _ = quantize_ref(x, QuantConfig(block="16x16"))
    expected = torch.full((32, 2), 0x7E)
    expected[:16, 1] = 0x7F
    assert torch.equal(scales.view(torch.uint8).int(), expected.int())


def test_a_tensor_without_a_finite_value_has_scale_one():
    _, scales, decode = quantize_ref(torch.full((2, 16), math.inf), QuantConfig())
    assert decode.item() == 1.0
    assert scales.view(torch.uint8).unique().tolist() == [0x7F]


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-38, 1e-37, 1e-30, 1e30, 1e38, FP32_MAX])
@pytest.mark.parametrize("config", [CANONICAL, FOUR_OVER_SIX, MXFP4], ids=QuantConfig.describe)
def test_extreme_magnitudes_stay_finite_and_match_the_oracle(magnitude: float, config: QuantConfig):
    x = torch.linspace(-1, 1, 64).view(1, 64).double().mul(magnitude).float()
    codes, scales, decode = quantize_ref(x, config)
    expected = oracle.mxfp4(x.numpy()) if config.format == "mxfp4" else oracle.nvfp4(x.numpy(), rule=str(config.scale_rule))
    assert oracle.mismatches(expected, unpack_ref(codes).numpy(), scales.view(torch.uint8).numpy()) == (0, 0)
    assert decode.item() == expected.decode
    assert dequantize_ref(codes, scales, decode).isfinite().all()


def test_below_the_smallest_scalable_maximum_the_encode_scale_is_capped():
    _, _, decode = quantize_ref(torch.full((1, 16), 1e-37), QuantConfig())
    assert decode.item() == np.float32(1) / np.float32(FP32_MAX)
    _, _, decode = quantize_ref(torch.full((1, 16), 1e-35), QuantConfig())
    assert decode.item() == np.float32(1) / (np.float32(2688) / np.float32(1e-35))


def test_an_outlier_silences_blocks_more_than_448_times_1024_below_it():
    x = torch.ones(1, 48)
    x[0, 0] = 448 * 1024.0
    x[0, 32:] = 1.01
    codes, scales, decode = quantize_ref(x, QuantConfig())
    assert scales.view(torch.uint8)[0].tolist() == [0x7E, 0x00, 0x01]
    assert dequantize_ref(codes, scales, decode)[0, 16:32].tolist() == [0.0] * 16


def test_values_beyond_a_static_amax_saturate():
    codes, scales = _first(_block(26880.0, -26880.0, 448.0))
    assert scales == [0x7E]
    assert codes[:3] == [7, 15, 2]


@pytest.mark.parametrize(("block_max", "byte"), [
    (6.0, 127), (4.0, 127), (3.99, 126), (7.99, 127), (8.0, 128), (2.0**-125, 0), (2.0**-126, 0), (1e-45, 0), (FP32_MAX, 252),
])  # fmt: skip
def test_mxfp4_scales_are_the_floor_exponent_minus_two(block_max: float, byte: int):
    codes, scales, _ = quantize_ref(torch.full((1, 32), block_max), QuantConfig(format="mxfp4"))
    assert scales.view(torch.uint8).tolist() == [[byte]]
    expected = min(block_max / 2.0 ** (byte - 127), 6.0)
    decoded = dequantize_ref(codes, scales).double() / 2.0 ** (byte - 127)
    assert abs(decoded[0, 0].item() - expected) <= 1.0


def test_mxfp4_scale_bytes_decode_to_their_powers_of_two():
    """2^-127 is a float32 denormal that a careless conversion flushes."""
    codes = torch.full((1, 255 * 16), 0x22, dtype=torch.uint8)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255).view(torch.float8_e8m0fnu)
    decoded = dequantize_ref(codes, scales)[0, ::32].double()
    assert torch.equal(decoded, torch.exp2(torch.arange(255).double() - 127))

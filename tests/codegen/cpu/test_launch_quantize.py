"""The C++ quantizer and Hadamard transform against the reference, bit for bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4compile.codegen.cpu import launch
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from tests.codegen import oracle

RULES = ("amax", "four_over_six", "four_over_six_mae", "four_over_six_absmax")
CONFIGS = (
    *(QuantConfig(scale_rule=r, global_scale=g) for r, g in itertools.product(RULES, ("tensor", "row"))),
    *(QuantConfig(scale_rule=r, block="16x16") for r in RULES),
    *(QuantConfig(scale_rule=r, global_scale="static", static_amax=2.5) for r in RULES[:2]),
    QuantConfig(format="mxfp4"),
    QuantConfig(rounding="stochastic"),
    QuantConfig(rounding="stochastic", global_scale="row"),
    QuantConfig(rounding="stochastic", block="16x16"),
    QuantConfig(rounding="stochastic", format="mxfp4"),
    *(QuantConfig(scale_rule="amax_17_16", rounding="stochastic", global_scale=g) for g in ("tensor", "row")),
    QuantConfig(hadamard=16),
    QuantConfig(hadamard=128, format="mxfp4"),
    QuantConfig(hadamard=64, rounding="stochastic"),
    *(QuantConfig(rounding="eden", global_scale=g) for g in ("tensor", "row")),
    QuantConfig(rounding="eden", hadamard=128),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1), (1, 16), (3, 17), (17, 33), (5, 256), (2, 272), (33, 600), (2, 3, 40), (0, 16), (4, 0), (2, 0, 8))


def _randn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _assert_same(kernels: launch.Kernels, x: Tensor, config: QuantConfig, axis: int = -1) -> None:
    seed = torch.tensor(-987654321012) if config.draws else None
    ours = launch.quantize(x, config, axis=axis, seed=seed, kernels=kernels)
    expected = quantize_ref(x, config, axis=axis, seed=seed)
    for name, mine, theirs in zip(("codes", "scales", "global scale"), ours, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.is_contiguous(), name
        mine, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (mine, theirs))
        assert torch.equal(mine, theirs), f"{name}: {(mine != theirs).sum()} bytes differ"


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_config_dtype_shape_and_axis(kernels: launch.Kernels, config: QuantConfig, dtype: torch.dtype):
    for shape, axis in itertools.product(SHAPES, (-1, -2)):
        _assert_same(kernels, _randn(shape).to(dtype), config, axis)


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
def test_strided_inputs(kernels: launch.Kernels, config: QuantConfig):
    base = _randn((80, 96), seed=1).bfloat16()
    for x in (base[::2, ::3], base.T, base[3:, 5:37], base[None].expand(2, -1, -1), base[:1].expand(8, -1)):
        _assert_same(kernels, x, config)
        _assert_same(kernels, x, config, axis=-2)


@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.hadamard], ids=QuantConfig.describe)
def test_every_bfloat16_beside_every_other_kind(kernels: launch.Kernels, config: QuantConfig):
    """All 65536 bit patterns: zeros of both signs, denormals, huge values, Inf, both NaNs; alone and next to ordinary values."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    _assert_same(kernels, patterns.view(64, 1024), config)
    mixed = _randn((4096, 16), seed=2).bfloat16()
    mixed[:, 5] = patterns[:: 2**4]
    _assert_same(kernels, mixed.view(64, 1024), config)


@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.hadamard], ids=QuantConfig.describe)
def test_values_at_and_beside_each_tie(kernels: launch.Kernels, config: QuantConfig):
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.5, 1, 1.5, 2, 3, 4], np.float32)
    near = (ties.view(np.int32)[:, None] + np.arange(-3, 4)).ravel().view(np.float32)
    x = torch.zeros(2, 256)
    x[0, 1 : 1 + near.size] = torch.from_numpy(near)
    x[:, ::16] = 6.0
    x[1] = -x[0]
    for scale in (1.0, 448 / 2688, 2.0**-9, 1e-30, 1e30):
        _assert_same(kernels, x * scale, config)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-38, 1e-36, 1e-20, 1e20, 3e38])
@pytest.mark.parametrize("config", CONFIGS[:13], ids=QuantConfig.describe)
def test_extreme_magnitudes(kernels: launch.Kernels, config: QuantConfig, magnitude: float):
    _assert_same(kernels, (_randn((32, 80), seed=3).double().clamp(-1, 1) * magnitude).float(), config)


@pytest.mark.parametrize("config", CONFIGS[:13], ids=QuantConfig.describe)
def test_wide_ranges_reach_subnormal_and_zero_scales(kernels: launch.Kernels, config: QuantConfig):
    gen = torch.Generator().manual_seed(4)
    exponents = (-30 * torch.rand(64, 32, generator=gen)).exp2().repeat_interleave(16, -1)
    _assert_same(kernels, _randn((64, 512), seed=5) * exponents, config)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, 6.0, math.inf, math.nan, 1e-45]), min_size=1, max_size=80),
    config=st.sampled_from(CONFIGS),
)
def test_any_float32_at_all(kernels: launch.Kernels, numbers: list[float], config: QuantConfig):
    x = torch.tensor(numbers, dtype=torch.float32)[None].repeat(2, 1)
    if config.hadamard and not x.isfinite().all():
        x = x.nan_to_num(1.0, 2.0, 3.0)
    _assert_same(kernels, x, config)


def test_a_million_elements_in_parallel_match_the_independent_oracle(kernels: launch.Kernels):
    x = torch.randint(-12, 13, (1024, 1024), generator=torch.Generator().manual_seed(6)).bfloat16()
    codes, scales, decode = launch.quantize(x, QuantConfig(), kernels=kernels)
    expected = oracle.nvfp4(x.float().numpy())
    unpacked = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2).numpy()
    assert oracle.mismatches(expected, unpacked, scales.view(torch.uint8).numpy()) == (0, 0)
    assert decode.item() == expected.decode


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
def test_the_number_of_threads_changes_nothing(kernels: launch.Kernels, config: QuantConfig, threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _assert_same(kernels, _randn((150, 700), seed=7).bfloat16(), config)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hadamard_is_the_reference_on_padded_rows(kernels: launch.Kernels, size: int, dtype: torch.dtype):
    for shape in ((1, 1), (3, size), (37, 2 * size + 5), (2, 3, 3 * size - 1), (0, size), (4, 0)):
        x = _randn(shape, seed=size).to(dtype)
        padded = torch.nn.functional.pad(x, (0, -shape[-1] % size))
        ours = launch.hadamard(x, size, kernels=kernels)
        assert ours.dtype == dtype and torch.equal(ours, hadamard_ref(padded, size))


def test_hadamard_spreads_non_finite_values(kernels: launch.Kernels):
    x = torch.ones(2, 32, dtype=torch.bfloat16)
    x[0, 3], x[1, 20] = math.inf, math.nan
    ours, expected = launch.hadamard(x, 16, kernels=kernels), hadamard_ref(x, 16)
    assert torch.equal(ours.isnan(), expected.isnan()) and torch.equal(ours.isinf(), expected.isinf())

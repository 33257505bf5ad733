"""The block quantizer against the oracle: no differing code or scale byte over ten million bf16 elements, and in every setting."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.e2m1 import unpack_ref
from fp4compile.codegen.reference.hadamard import hadamard_ref
from tests.codegen import oracle

RULES = ("amax", "four_over_six", "four_over_six_mae", "four_over_six_absmax")


def _with_outlier(x: Tensor) -> Tensor:
    x[x.shape[0] // 2, x.shape[1] // 3] = 1e4
    return x


def _blockwise_exponents(rows: int, cols: int, gen: torch.Generator) -> Tensor:
    exponents = -20 * torch.rand(rows, cols // 16, generator=gen)
    return torch.randn(rows, cols, generator=gen) * exponents.exp2().repeat_interleave(16, -1)


# bf16 and small integers land on exact e2m1 and e4m3 midpoints, where a wrong order of operations shows; float32 noise hides it.
DISTRIBUTIONS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "normal": lambda r, c, g: torch.randn(r, c, generator=g),
    "uniform": lambda r, c, g: torch.rand(r, c, generator=g) * 2 - 1,
    "small integers": lambda r, c, g: torch.randint(-12, 13, (r, c), generator=g).float(),
    "heavy tail": lambda r, c, g: torch.randn(r, c, generator=g) / torch.rand(r, c, generator=g),
    "per row 2^-12..2^3": lambda r, c, g: torch.randn(r, c, generator=g) * (15 * torch.rand(r, 1, generator=g) - 12).exp2(),
    "per block 2^-20..1": _blockwise_exponents,
    "one outlier of 1e4": lambda r, c, g: _with_outlier(torch.randn(r, c, generator=g)),
    "around 1e-6": lambda r, c, g: torch.randn(r, c, generator=g) * 1e-6,
    "around 1e30": lambda r, c, g: torch.randn(r, c, generator=g) * 1e30,
}


def _assert_equal(x: Tensor, config: QuantConfig, expected: oracle.Quantized, *, axis: int = -1, seed: Tensor | None = None) -> None:
    codes, scales, decode = quantize_ref(x, config, axis=axis, seed=seed)
    assert scales.dtype == config.fmt.scale_dtype and codes.dtype == torch.uint8 and decode.dtype == torch.float32
    unpacked, scale_bytes = unpack_ref(codes).numpy(), scales.view(torch.uint8).numpy()
    assert unpacked.shape == expected.codes.shape and scale_bytes.shape == expected.scales.shape
    assert oracle.mismatches(expected, unpacked, scale_bytes) == (0, 0)
    assert np.array_equal(decode.numpy(), expected.decode)


def _oracle(x: Tensor, config: QuantConfig, random_bytes: oracle.Bytes | None = None) -> oracle.Quantized:
    values = x.float().numpy()
    if config.format == "mxfp4":
        return oracle.mxfp4(values, random_bytes=random_bytes)
    return oracle.nvfp4(
        values,
        rule=str(config.scale_rule),
        granularity=str(config.global_scale),
        tile=config.is_tile,
        static_amax=config.static_amax,
        random_bytes=random_bytes,
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_ten_million_bf16_elements(name: str):
    """1.18 M elements a distribution, 10.6 M in all."""
    gen = torch.Generator().manual_seed(len(name))
    x = DISTRIBUTIONS[name](1152, 1024, gen).bfloat16()
    config = QuantConfig()
    _assert_equal(x, config, _oracle(x, config))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_every_rule_and_block_on_every_distribution(name: str, rule: str, block: str):
    x = DISTRIBUTIONS[name](80, 512, torch.Generator().manual_seed(3)).bfloat16()
    config = QuantConfig(scale_rule=rule, block=block)
    _assert_equal(x, config, _oracle(x, config))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("rule", ["amax", "four_over_six"])
@pytest.mark.parametrize("granularity", ["row", "static"])
def test_row_and_static_global_scale(name: str, rule: str, granularity: str):
    x = DISTRIBUTIONS[name](80, 512, torch.Generator().manual_seed(4)).bfloat16()
    static_amax = 3.0 if granularity == "static" else None  # far below some maxima: those blocks saturate at 448
    config = QuantConfig(scale_rule=rule, global_scale=granularity, static_amax=static_amax)
    _assert_equal(x, config, _oracle(x, config))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp4_on_every_distribution(name: str, dtype: torch.dtype):
    x = DISTRIBUTIONS[name](80, 512, torch.Generator().manual_seed(5)).to(dtype)
    config = QuantConfig(format="mxfp4")
    _assert_equal(x, config, _oracle(x, config))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float16_and_float32_inputs(name: str, dtype: torch.dtype):
    x = DISTRIBUTIONS[name](80, 512, torch.Generator().manual_seed(6)).to(dtype)
    config = QuantConfig()
    _assert_equal(x, config, _oracle(x, config))


SHAPES = [(1, 1), (1, 16), (3, 17), (17, 31), (5, 33), (16, 48), (33, 100), (2, 3, 40), (2, 1, 2, 16), (0, 16), (0, 5), (2, 0, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("config", [
    QuantConfig(),
    QuantConfig(block="16x16"),
    QuantConfig(scale_rule="four_over_six", block="16x16"),
    QuantConfig(scale_rule="four_over_six", global_scale="row"),
    QuantConfig(global_scale="static", static_amax=2.0),
    QuantConfig(format="mxfp4"),
], ids=QuantConfig.describe)  # fmt: skip
def test_ragged_batched_transposed_and_empty_shapes(shape: tuple[int, ...], axis: int, config: QuantConfig):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    _assert_equal(x if axis == -1 else x.mT.contiguous(), config, _oracle(x, config), axis=axis)


@pytest.mark.parametrize("config", [
    QuantConfig(rounding="stochastic"),
    QuantConfig(rounding="stochastic", block="16x16"),
    QuantConfig(rounding="stochastic", global_scale="row"),
    QuantConfig(rounding="stochastic", format="mxfp4"),
], ids=QuantConfig.describe)  # fmt: skip
@pytest.mark.parametrize("shape", [(32, 64), (7, 50), (2, 3, 40)], ids=str)
def test_stochastic_rounding_draws_the_documented_bytes(config: QuantConfig, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    padded = -(-shape[-1] // config.fmt.block) * config.fmt.block
    bytes_ = oracle.random_bytes(-123456789, (*shape[:-1], padded))
    _assert_equal(x, config, _oracle(x, config, bytes_), seed=torch.tensor(-123456789))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_hadamard_rotates_first_rounds_to_the_input_dtype_and_takes_the_maximum_after(size: int, fmt: str):
    x = torch.randn(24, 3 * size - 5, generator=torch.Generator().manual_seed(size)).bfloat16()
    config = QuantConfig(format=fmt, hadamard=size)
    rotated = hadamard_ref(torch.nn.functional.pad(x, (0, 5)), size)
    _assert_equal(x, config, _oracle(rotated, config))


FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 6.0, 2688.0, 1e-45, 1.2e-38, 3.4e38, float("inf"), float("nan")])


@settings(max_examples=300, deadline=None)
@given(
    numbers=st.lists(FLOATS, min_size=1, max_size=70),
    rows=st.integers(1, 3),
    rule=st.sampled_from(RULES),
    granularity=st.sampled_from(["tensor", "row"]),
)
def test_any_float32_at_all(numbers: list[float], rows: int, rule: str, granularity: str):
    x = torch.tensor(numbers, dtype=torch.float32).repeat(rows, 1)
    for config in (QuantConfig(scale_rule=rule, global_scale=granularity), QuantConfig(format="mxfp4")):
        _assert_equal(x, config, _oracle(x, config))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-40, 40), rule=st.sampled_from(RULES))
def test_scaling_by_a_power_of_two_changes_the_global_scale_only(seed: int, power: int, rule: str):
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(seed))
    config = QuantConfig(scale_rule=rule)
    plain, scaled = quantize_ref(x, config), quantize_ref(x * 2.0**power, config)
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1].view(torch.uint8), scaled[1].view(torch.uint8))
    assert torch.equal(plain[2] * 2.0**power, scaled[2])


@pytest.mark.parametrize("config", [QuantConfig(scale_rule=r, block=b) for r, b in itertools.product(RULES, ("1x16", "16x16"))])
def test_negating_flips_the_sign_bits_only(config: QuantConfig):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(9))
    plain, negated = quantize_ref(x, config), quantize_ref(-x, config)
    assert torch.equal(plain[0] ^ 0x88, negated[0])
    assert torch.equal(plain[1].view(torch.uint8), negated[1].view(torch.uint8))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(64, 96), (48, 16)], ids=str)
def test_tiles_give_the_transpose_the_same_codes(rule: str, shape: tuple[int, int]):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(10)).bfloat16()
    config = QuantConfig(block="16x16", scale_rule=rule)
    codes, scales, decode = quantize_ref(w, config)
    codes_t, scales_t, decode_t = quantize_ref(w, config, axis=-2)
    assert torch.equal(unpack_ref(codes).T, unpack_ref(codes_t))
    assert torch.equal(scales.view(torch.uint8)[::16], scales_t.view(torch.uint8)[::16].T)
    assert torch.equal(decode, decode_t)
    assert torch.equal(dequantize_ref(codes, scales, decode).T, dequantize_ref(codes_t, scales_t, decode_t))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_dequantize_is_the_product_of_value_scale_and_multiplier(name: str):
    x = DISTRIBUTIONS[name](16, 64, torch.Generator().manual_seed(11))
    codes, scales, decode = quantize_ref(x, QuantConfig())
    raw = dequantize_ref(codes, scales)
    scale_bytes = scales.view(torch.uint8).numpy()
    q = oracle.Quantized(codes=unpack_ref(codes).numpy(), scales=scale_bytes, decode=np.ones((), np.float32))
    assert np.array_equal(raw.double().numpy(), oracle.dequantized(q, oracle.e4m3_values(scale_bytes)))
    assert torch.equal(raw, raw.bfloat16().float()), "value times block scale is exact in bf16"
    assert torch.equal(dequantize_ref(codes, scales, decode), raw * decode)

"""The public `quantize` and the tensor it returns."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.errors import IllegalCombination, UnknownName, UnsupportedDtype
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.qtensor import SeedMissing, ShapeTooSmall, quantize
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.swizzle import swizzle_ref


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_value_by_hand():
    """amax 6 gives S = 448, scale byte 448 and multiplier 1/448, so the grid is e2m1's own."""
    x = torch.tensor([[6.0, -4.0, 3.0, 0.5, -0.2, 0.3, 2.4, 5.1] * 2])
    q = quantize(x)
    assert q.codes.tolist() == [[0xE7, 0x15, 0x18, 0x74] * 2]
    assert q.scales.view(torch.uint8).tolist() == [[0x7E]]
    assert q.global_scale.item() == (torch.tensor(1.0) / 448).item()
    expected = torch.tensor([[6.0, -4.0, 3.0, 0.5, -0.0, 0.5, 2.0, 6.0] * 2])
    assert torch.allclose(q.dequantize(), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (1, 16)], ids=str)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kwargs", [
    {}, {"global_scale": "row"}, {"global_scale": "1x128"}, {"block": "16x16"}, {"scale_rule": "four_over_six"}, {"format": "mxfp4"},
    {"global_scale": "static", "static_amax": 4.0}, {"rounding": "stochastic", "seed": 3},
], ids=str)  # fmt: skip
def test_dequantize_has_the_sources_shape_and_dtype_and_is_near(dtype, shape, axis, kwargs):
    x = _randn(*shape).to(dtype)
    q = quantize(x, axis=axis, **kwargs)
    y = q.dequantize()
    assert y.shape == x.shape and y.dtype == dtype
    assert q.dequantize(torch.float64).dtype == torch.float64
    step = x.abs().max() / (1 if kwargs.get("rounding") else 2)  # an e2m1 step is at most a third of the block maximum
    assert ((y - x).abs() <= step).all()
    assert (y - x).float().square().sum() < 0.05 * x.float().square().sum()


def test_codes_are_the_references():
    x = _randn(5, 48)
    q = quantize(x, scale_rule="four_over_six", global_scale="row")
    codes, scales, decode = quantize_ref(x, QuantConfig(scale_rule="four_over_six", global_scale="row"))
    assert torch.equal(q.codes, codes) and torch.equal(q.global_scale, decode)
    assert torch.equal(q.scales.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(q.dequantize(), dequantize_ref(codes, scales, decode))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_dequantize_undoes_the_hadamard(size: int, axis: int, fmt: str):
    x = _randn(2 * size - 3, 2 * size - 3, seed=size)
    x[0, 0] = 40.0  # an outlier the rotation spreads: what is rotated back must still hold it
    y = quantize(x, format=fmt, hadamard=size, axis=axis).dequantize()
    assert y.shape == x.shape
    assert (y - x).square().sum() < 0.03 * x.square().sum()
    assert abs(y[0, 0].item() - 40) < 4


def test_bytes_are_counted():
    assert quantize(_randn(32, 64)).nbytes == 32 * 32 + 32 * 4 + 4
    assert quantize(_randn(32, 64), format="mxfp4").nbytes == 32 * 32 + 32 * 2 + 4


def test_swizzled_scales_are_the_128x4_layout():
    q = quantize(_randn(130, 80))
    assert q.swizzled_scales().shape == (256 * 8,)
    assert torch.equal(q.swizzled_scales().view(torch.uint8), swizzle_ref(q.scales).view(torch.uint8))


def test_the_same_seed_gives_the_same_codes():
    x = _randn(8, 64)
    one, two, three = (quantize(x, rounding="stochastic", seed=s).codes for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_non_contiguous_input():
    x = _randn(64, 48)[::2, ::3]
    assert torch.equal(quantize(x).codes, quantize(x.contiguous()).codes)
    assert torch.equal(quantize(x.T).codes, quantize(x.T.contiguous()).codes)


@pytest.mark.parametrize(("kwargs", "error", "said"), [
    ({"format": "nvfp5"}, UnknownName, "Did you mean 'nvfp4'"),
    ({"scale_rule": "amx"}, UnknownName, "Did you mean 'amax'"),
    ({"block": "8x8"}, UnknownName, "1x16"),
    ({"block": "1x32"}, IllegalCombination, "1x16 or 16x16"),
    ({"format": "mxfp4", "scale_rule": "four_over_six"}, IllegalCombination, "powers of two"),
    ({"format": "mxfp4", "global_scale": "row"}, IllegalCombination, "no global scale"),
    ({"hadamard": 8}, IllegalCombination, "Use 16"),
    ({"block": "16x16", "hadamard": 16}, IllegalCombination, "rotation"),
    ({"block": "16x16", "global_scale": "row"}, IllegalCombination, "spans rows"),
    ({"block": "16x16", "global_scale": "1x128"}, IllegalCombination, "spans rows"),
    ({"format": "mixfp4", "global_scale": "1x128"}, IllegalCombination, "NVFP4 alone"),
    ({"scale_rule": "four_over_six", "rounding": "stochastic", "seed": 1}, IllegalCombination, "biased"),
    ({"global_scale": "static"}, IllegalCombination, "come together"),
    ({"static_amax": 1.0}, IllegalCombination, "come together"),
    ({"global_scale": "static", "static_amax": 0.0}, IllegalCombination, "positive"),
    ({"global_scale": "static", "static_amax": float("nan")}, IllegalCombination, "positive"),
    ({"rounding": "stochastic"}, SeedMissing, "seed=<int>"),
], ids=str)  # fmt: skip
def test_errors_name_what_to_do(kwargs, error, said):
    with pytest.raises(error, match=said):
        quantize(_randn(16, 16), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype):
    with pytest.raises(UnsupportedDtype, match="Cast the tensor"):
        quantize(torch.zeros(4, 16).to(dtype))


@pytest.mark.parametrize("shape", [(), (16,)], ids=str)
def test_vectors_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ShapeTooSmall, match="x\\[None\\]"):
        quantize(torch.zeros(shape))

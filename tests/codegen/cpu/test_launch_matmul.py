"""The C++ products against float64 products of the exact values, and against the reference's epilogue."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.cpu import launch
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref

TENSOR, ROW, MXFP4 = QuantConfig(), QuantConfig(global_scale="row"), QuantConfig(format="mxfp4")
WEIGHTS = {"tensor": TENSOR, "row": ROW, "mxfp4": MXFP4, "hadamard": QuantConfig(hadamard=64)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Operand = tuple[Tensor, Tensor | None, Tensor | None]


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _exact(operand: Operand, k: int) -> Tensor:
    x, scales, decode = operand
    if scales is None:
        return x.double()
    assert decode is not None
    scale = decode.double()[..., None] if decode.ndim == x.ndim - 1 else decode.double()[..., None, None]
    return dequantize_ref(x, scales).double()[..., :k] * scale


def _assert_near(out: Tensor, a: Operand, b: Operand, k: int, dtype: torch.dtype, bias: Tensor | None = None) -> None:
    """fp32 sums of K products err below K eps sum|terms|; the output cast adds half an ulp."""
    left, right = _exact(a, k), _exact(b, k)
    extra = 0 if bias is None else bias.double()
    exact, magnitude = left @ right.mT + extra, left.abs() @ right.abs().mT + abs(extra)
    bound = max(k, 1) * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * exact.abs()
    assert out.dtype == dtype and out.shape == exact.shape
    wrong = ~((out.double() - exact).abs() <= bound)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} entries, first {wrong.nonzero()[0].tolist()}"


def _mm(kernels: launch.Kernels, a: Operand, b: Operand, k: int, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    return launch.scaled_mm(*a, *b, bias, k, dtype, kernels=kernels)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15, 17, 130])
def test_weight_only(kernels: launch.Kernels, weight: str, dtype: torch.dtype, m: int):
    for n, k in ((1, 16), (5, 40), (33, 100), (64, 17), (70, 576), (3, 1090)):
        a = (_randn(m, k, seed=1, dtype=dtype), None, None)
        b = quantize_ref(_randn(n, k, seed=2), WEIGHTS[weight])
        if WEIGHTS[weight].hadamard:
            a = (torch.nn.functional.pad(a[0], (0, -k % 64)), None, None)
        _assert_near(_mm(kernels, a, b, a[0].shape[1], torch.float32), a, b, a[0].shape[1], torch.float32)


@pytest.mark.parametrize("activation", ["tensor", "row", "mxfp4"])
@pytest.mark.parametrize("weight", ["tensor", "row", "mxfp4"])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 17, 130])
def test_both_operands_coded(kernels: launch.Kernels, activation: str, weight: str, m: int):
    for n, k in ((1, 16), (33, 100), (70, 576)):
        a, b = quantize_ref(_randn(m, k, seed=1), WEIGHTS[activation]), quantize_ref(_randn(n, k, seed=2), WEIGHTS[weight])
        _assert_near(_mm(kernels, a, b, k, torch.float32), a, b, k, torch.float32)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("m", [1, 3, 40])
def test_output_and_bias_dtypes(kernels: launch.Kernels, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, m: int):
    b = quantize_ref(_randn(37, 96, seed=3), TENSOR)
    bias = None if bias_dtype is None else _randn(37, seed=4).to(bias_dtype)
    for a in ((_randn(m, 96, seed=5, dtype=torch.bfloat16), None, None), quantize_ref(_randn(m, 96, seed=5), ROW)):
        _assert_near(_mm(kernels, a, b, 96, out_dtype, bias), a, b, 96, out_dtype, bias)


@pytest.mark.parametrize("m", [1, 4, 64])
def test_the_epilogue_rounds_in_the_references_order(kernels: launch.Kernels, m: int):
    """With K = 16 every accumulator is exact, so kernel and reference must agree in each bit."""
    bias = _randn(48, seed=6)
    for first, second in itertools.product((TENSOR, ROW), repeat=2):
        a, b = quantize_ref(_randn(m, 16, seed=7), first), quantize_ref(_randn(48, 16, seed=8), second)
        for dtype, used_bias in itertools.product(DTYPES, (None, bias, bias.bfloat16())):
            assert torch.equal(_mm(kernels, a, b, 16, dtype, used_bias), scaled_mm_ref(*a, *b, used_bias, 16, dtype))


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("with_a", [True, False])
@pytest.mark.parametrize("with_b", [True, False])
def test_absent_global_scales_are_one(kernels: launch.Kernels, m: int, with_a: bool, with_b: bool):
    a, b = quantize_ref(_randn(m, 16, seed=9), ROW), quantize_ref(_randn(9, 16, seed=10), TENSOR)
    a, b = (a[0], a[1], a[2] if with_a else None), (b[0], b[1], b[2] if with_b else None)
    assert torch.equal(_mm(kernels, a, b, 16, torch.float32), scaled_mm_ref(*a, *b, None, 16, torch.float32))


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("config", [TENSOR, ROW, MXFP4], ids=QuantConfig.describe)
def test_batches(kernels: launch.Kernels, quantized: bool, config: QuantConfig):
    x = _randn(2, 3, 5, 48, seed=11, dtype=torch.bfloat16) * torch.tensor([1.0, 64.0, 2.0**-9]).view(3, 1, 1).bfloat16()
    a = quantize_ref(x, config) if quantized else (x, None, None)
    one, many = quantize_ref(_randn(7, 48, seed=12), config), quantize_ref(_randn(2, 3, 7, 48, seed=13), config)
    for b in (one, many):
        _assert_near(_mm(kernels, a, b, 48, torch.float32), a, b, 48, torch.float32)


def test_other_biases_and_coded_activations_against_dense_weights(kernels: launch.Kernels):
    a, b = quantize_ref(_randn(5, 48, seed=14), TENSOR), quantize_ref(_randn(7, 48, seed=15), TENSOR)
    full = _randn(5, 7, seed=16, dtype=torch.bfloat16)
    _assert_near(_mm(kernels, a, b, 48, torch.bfloat16, full), a, b, 48, torch.bfloat16, full)
    dense = (_randn(7, 48, seed=17, dtype=torch.bfloat16), None, None)
    _assert_near(_mm(kernels, a, dense, 48, torch.float32), a, dense, 48, torch.float32)
    _assert_near(_mm(kernels, dense, dense, 48, torch.float32), dense, dense, 48, torch.float32)


@pytest.mark.parametrize("m", [1, 7, 30])
def test_strided_operands(kernels: launch.Kernels, m: int):
    x = _randn(2 * m, 200, seed=18, dtype=torch.bfloat16)
    codes, scales, decode = quantize_ref(_randn(20, 96, seed=19), ROW)
    b = (codes.repeat_interleave(2, 0)[::2], scales.view(torch.uint8).T.contiguous().T.view(scales.dtype), decode.repeat_interleave(2)[::2])
    for a in (x[::2, 7:103], x[:m, :192:2], x[:1, :96].expand(m, -1), x.T[:96, :m].T):
        operand = (a, None, None)
        _assert_near(_mm(kernels, operand, b, 96, torch.float32), operand, b, 96, torch.float32)


@pytest.mark.parametrize("k", [2000, 2047, 2048, 4096])
def test_rows_four_kibibytes_apart(kernels: launch.Kernels, k: int):
    x = _randn(20, 2048 if k < 2048 else k, seed=28, dtype=torch.bfloat16)[:, :k]
    a, b = (x, None, None), quantize_ref(_randn(40, k, seed=29), TENSOR)
    _assert_near(_mm(kernels, a, b, k, torch.float32), a, b, k, torch.float32)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 16), (5, 0, 16), (3, 5, 0), (0, 0, 0), (20, 5, 0), (20, 0, 32)])
def test_empty_products(kernels: launch.Kernels, m: int, n: int, k: int):
    b, bias = quantize_ref(_randn(n, k), TENSOR), _randn(n, seed=1)
    for a in ((_randn(m, k), None, None), (_randn(m, k, dtype=torch.bfloat16), None, None), quantize_ref(_randn(m, k), ROW)):
        assert torch.equal(_mm(kernels, a, b, k, torch.float32), torch.zeros(m, n))
        assert torch.equal(_mm(kernels, a, b, k, torch.float32, bias), bias.expand(m, n))


@pytest.mark.parametrize("m", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("config", [TENSOR, MXFP4], ids=QuantConfig.describe)
def test_non_finite_values_stay_where_they_belong(kernels: launch.Kernels, m: int, bad: float, config: QuantConfig):
    x, w = _randn(m, 100, seed=20, dtype=torch.bfloat16), _randn(40, 100, seed=21)
    x[m // 2, 98] = bad
    w[7, 3] = bad
    b = quantize_ref(w, config)
    for a in ((x, None, None), (x.float(), None, None), quantize_ref(x, config)):
        ours, expected = _mm(kernels, a, b, 100, torch.bfloat16), scaled_mm_ref(*a, *b, None, 100, torch.bfloat16)
        assert torch.equal(ours.isnan(), expected.isnan()) and torch.equal(ours.isinf(), expected.isinf())
        assert torch.equal(ours.sign().nan_to_num(), expected.sign().nan_to_num())


@pytest.mark.parametrize("m", [1, 8, 20])
def test_codes_beyond_k_are_not_read(kernels: launch.Kernels, m: int):
    codes, scales, decode = quantize_ref(_randn(9, 40, seed=22), TENSOR)
    codes[:, 20:] = 0x77
    for dtype in DTYPES:
        wide = torch.full((m, 64), math.nan, dtype=dtype)
        wide[:, :40] = _randn(m, 40, seed=23)
        a = (wide[:, :40], None, None)
        b = (codes, scales, decode)
        _assert_near(_mm(kernels, a, b, 40, torch.float32), a, b, 40, torch.float32)


@pytest.mark.parametrize("m", [1, 12])
def test_every_scale_byte_and_code(kernels: launch.Kernels, m: int):
    """One weight row for each byte; each row holds all sixteen codes. Negative e4m3 scales, as foreign checkpoints may have, included."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[0::2] | codes[1::2] << 4).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    x = torch.eye(16)[torch.arange(m) % 16]
    for dtype in (torch.bfloat16, torch.float32):
        ours = launch.scaled_mm(x.to(dtype), None, None, packed, scales, None, None, 16, torch.float32, kernels=kernels)
        assert torch.equal(ours, scaled_mm_ref(x, None, None, packed, scales, None, None, 16, torch.float32)) or ours.isnan().any()
        expected = dequantize_ref(packed, scales).T[torch.arange(m) % 16]
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("m", [1, 12])
def test_every_power_of_two_scale(kernels: launch.Kernels, m: int):
    packed = torch.full((256, 16), 0x22, dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e8m0fnu)
    x = torch.zeros(m, 32)
    x[:, 3] = 1.0
    ours = launch.scaled_mm(x, None, None, packed, scales, None, None, 32, torch.float32, kernels=kernels)
    assert torch.equal(ours[:, :255].double(), torch.exp2(torch.arange(255).double() - 127).expand(m, -1))
    assert ours[:, 255].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("m", "n"), [(1, 2000), (8, 700), (300, 20), (300, 700)])
def test_the_number_of_threads_changes_nothing(kernels: launch.Kernels, threads: int, m: int, n: int):
    a = (_randn(m, 256, seed=24, dtype=torch.bfloat16), None, None)
    b = quantize_ref(_randn(n, 256, seed=25), TENSOR)
    before = torch.get_num_threads()
    expected = _mm(kernels, a, b, 256, torch.bfloat16)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(_mm(kernels, a, b, 256, torch.bfloat16), expected)
    finally:
        torch.set_num_threads(before)
    _assert_near(expected, a, b, 256, torch.bfloat16)


@pytest.mark.parametrize("quantized", [True, False])
def test_grouped_products_are_the_references(kernels: launch.Kernels, quantized: bool):
    offs = torch.tensor([3, 3, 28], dtype=torch.int32)
    x = _randn(30, 40, seed=26, dtype=torch.bfloat16)
    a = quantize_ref(x, ROW) if quantized else (x, None, None)
    b = quantize_ref(_randn(3, 7, 40, seed=27), TENSOR)
    ours = launch.scaled_grouped_mm(*a, *b, offs, 40, torch.float32, kernels=kernels)
    expected = scaled_grouped_mm_ref(*a, *b, offs, 40, torch.float32)
    assert ours.shape == expected.shape and torch.equal(ours[28:], torch.zeros(2, 7))
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order

"""The emulated block-scaled product: bit for bit where float32 sums are exact, nearer to float64 than float32 arithmetic elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernels import launch
from fp4compile.codegen.kernels.launch_runs import RunsOfOtherOperands
from fp4compile.codegen.ops import quantize_args
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from tests.codegen.kernels.exact_products import KINDS, Side, exact_side
from tests.codegen.kernels.hard_inputs import first_differences

PAIRS = [(a, b) for a in KINDS for b in KINDS if not {a, b} <= {"bf16", "fp16", "fp32"} or (a, b) in (("bf16", "bf16"), ("fp16", "fp32"))]

GRANULARITIES = [("none", "none"), ("tensor", "none"), ("none", "row"), ("row", "tensor"), ("tensor", "row")]


def assert_exact(a: Side, b: Side, k: int, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32) -> None:
    got = launch.scaled_mm(*a.arguments(), *b.arguments(), bias, k, out_dtype)
    want = scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, out_dtype)
    assert got.is_contiguous()
    assert not first_differences(got, want), first_differences(got, want)


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=str)
def test_every_pair_of_operands(device: torch.device, left: str, right: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for m, n, k in ((3, 70, 150), (40, 20, 64)):
        a, b = exact_side(left, (m, k), generator, global_scale="row"), exact_side(right, (n, k), generator, global_scale="tensor")
        assert_exact(a, b, k)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 16), (17, 65, 33), (65, 3, 47), (130, 140, 70), (2, 5, 0)], ids=str)
def test_ragged_shapes(device: torch.device, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    generator = torch.Generator(device).manual_seed(1)
    assert_exact(exact_side("nvfp4", (m, k), generator), exact_side("nvfp4", (n, k), generator, global_scale="tensor"), k)
    assert_exact(exact_side("bf16", (m, k), generator), exact_side("nvfp4", (n, k), generator, global_scale="row"), k)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_the_epilogue_rounds_in_the_fixed_order(device: torch.device, granularity: tuple[str, str], out_dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(2)
    a = exact_side("nvfp4", (20, 48), generator, global_scale=granularity[0])
    b = exact_side("nvfp4", (24, 48), generator, global_scale=granularity[1])
    biases = (torch.randn(*s, generator=generator, device=device) for s in ((24,), (1,), (20, 24), (20, 1)))
    assert_exact(a, b, 48, None, out_dtype)
    for i, bias in enumerate(biases):
        # Either dtype of every bias, under other granularities.
        assert_exact(a, b, 48, bias.bfloat16() if (i + GRANULARITIES.index(granularity)) % 2 else bias, out_dtype)


@pytest.mark.parametrize("granularity", ["none", "tensor", "row"])
def test_batches(device: torch.device, granularity: str) -> None:
    generator = torch.Generator(device).manual_seed(3)
    for batch in ((3,), (2, 3)):
        a = exact_side("nvfp4", (*batch, 5, 40), generator, global_scale=granularity)
        own = exact_side("nvfp4", (*batch, 7, 40), generator, global_scale=granularity)
        shared = exact_side("nvfp4", (7, 40), generator, global_scale=granularity)
        high = exact_side("bf16", (*batch, 5, 40), generator)
        bias = torch.randn(7, generator=generator, device=device)
        for left, right in ((a, own), (a, shared), (high, own), (high, shared)):
            assert_exact(left, right, 40, bias)


@pytest.mark.parametrize("granularity", [("1x128", "1x128"), ("1x128", "tensor"), ("row", "1x128")], ids=str)
def test_a_global_scale_for_each_128_columns(device: torch.device, granularity: tuple[str, str]) -> None:
    generator = torch.Generator(device).manual_seed(6)
    # Whole runs in tiles of many rows: several of them once.
    many = (130, 66, 256) if granularity == ("1x128", "1x128") else (66, 7, 256)
    for i, (lead, shared, (m, n, k)) in enumerate((
        ((), True, (3, 70, 300)),
        ((), True, many),
        ((2,), True, (5, 7, 129)),
        ((2,), False, (5, 7, 40)),
    )):
        a = exact_side("nvfp4", (*lead, m, k), generator, global_scale=granularity[0])
        b = exact_side("nvfp4", (n, k) if shared else (*lead, n, k), generator, global_scale=granularity[1])
        if i != 1:
            assert_exact(a, b, k)
        assert_exact(a, b, k, torch.randn(n, generator=generator, device=device), torch.bfloat16)
    high = exact_side("bf16", (3, 40), generator)
    with pytest.raises(RunsOfOtherOperands, match=r"meets an operand in torch\.bfloat16; both must be nvfp4"):
        assert_exact(high, exact_side("nvfp4", (7, 40), generator, global_scale="1x128"), 40)


def test_any_strides(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(4)
    b = exact_side("nvfp4", (24, 64), generator)
    high = exact_side("bf16", (64, 20), generator).data
    assert_exact(Side(data=high.t(), scales=None, global_scale=None), b, 64)
    assert_exact(Side(data=high.t()[::3], scales=None, global_scale=None), b, 64)
    assert b.scales is not None
    transposed = Side(
        data=b.data.t().contiguous().t(), scales=b.scales.view(torch.uint8).t().contiguous().t().view(b.scales.dtype), global_scale=None
    )
    assert_exact(exact_side("nvfp4", (5, 64), generator), transposed, 64)


def test_results_without_elements(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(5)
    for m, n in ((0, 5), (5, 0)):
        out = launch.scaled_mm(
            *exact_side("bf16", (m, 32), generator).arguments(),
            *exact_side("nvfp4", (n, 32), generator).arguments(),
            None,
            32,
            torch.bfloat16,
        )
        assert out.shape == (m, n)
        assert out.dtype == torch.bfloat16


def test_columns_past_k_are_ignored(device: torch.device) -> None:
    """A rotated operand has non-zero codes up to the Hadamard size."""
    generator = torch.Generator(device).manual_seed(6)
    a, b = exact_side("nvfp4", (5, 128), generator), exact_side("nvfp4", (9, 128), generator)
    assert_exact(a, b, 70)
    high = Side(data=exact_side("fp32", (5, 70), generator).data, scales=None, global_scale=None)
    assert_exact(high, b, 70)


@pytest.mark.parametrize("left", ["bf16", "fp16", "fp32", "nvfp4"])
def test_nearer_to_float64_than_float32_arithmetic_can_promise(device: torch.device, left: str) -> None:
    """Every product is exact, so the error is that of summing K numbers in float32: at most K 2^-24 of the sum of magnitudes."""
    generator = torch.Generator(device).manual_seed(7)
    k = 512
    weight = torch.randn(40, k, generator=generator, device=device)
    codes, scales, decode = launch.quantize(weight, -1, *quantize_args(QuantConfig()))
    x = torch.randn(20, k, generator=generator, device=device)
    if left == "nvfp4":
        operand = launch.quantize(x, -1, *quantize_args(QuantConfig(global_scale="row")))
        values = dequantize_ref(operand[0], operand[1]).double() * operand[2].double()[:, None]
    else:
        data = x.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[left])
        operand, values = (data, None, None), data.double()
    exact_weight = dequantize_ref(codes, scales).double() * decode.double()
    got = launch.scaled_mm(*operand, codes, scales, decode, None, k, torch.float32).double()
    bound = (k + 4) * 2.0**-24 * (values.abs() @ exact_weight.abs().mT)
    assert ((got - values @ exact_weight.mT).abs() <= bound).all()


def test_non_finite_blocks_stay_visible(device: torch.device) -> None:
    x = torch.randn(3, 64, generator=torch.Generator(device).manual_seed(8), device=device)
    x[1, 7] = float("inf")
    weight = torch.randn(6, 64, generator=torch.Generator(device).manual_seed(9), device=device)
    weight[4, 63] = float("nan")
    operands = [launch.quantize(t, -1, *quantize_args(QuantConfig())) for t in (x, weight)]
    out = launch.scaled_mm(*operands[0], *operands[1], None, 64, torch.bfloat16)
    expected = torch.zeros(3, 6, dtype=torch.bool, device=device)
    expected[1, :] = expected[:, 4] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("high", ["bf16", "fp16", "fp32"])
def test_every_scale_of_either_format(device: torch.device, high: str) -> None:
    """Each scale byte with each code, against a one-hot operand, so that a product is a value itself."""
    values = torch.eye(16, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[high], device=device)
    pairs = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8, device=device)
    for dtype, block in ((torch.float8_e4m3fn, 16), (torch.float8_e8m0fnu, 32)):
        codes = pairs.repeat(256, block // 16)
        scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
        # Below 2^-126 tensor cores may flush what float32 would hold: compare where the smallest code is normal.
        usable = slice(0, 127) if block == 16 else slice(3, 253)
        operand = torch.nn.functional.pad(values, (0, block - 16))
        assert_exact(
            Side(data=operand, scales=None, global_scale=None),
            Side(data=codes[usable], scales=scales[usable].view(dtype), global_scale=None),
            block,
        )


def test_a_dtype_without_kernels_is_refused(device: torch.device) -> None:
    b = exact_side("nvfp4", (8, 32), torch.Generator(device).manual_seed(10))
    with pytest.raises(UnsupportedDtype, match="float64"):
        launch.scaled_mm(torch.zeros(4, 32, dtype=torch.float64, device=device), None, None, *b.arguments(), None, 32, torch.float32)

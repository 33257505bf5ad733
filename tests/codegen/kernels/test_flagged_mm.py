"""Products of blocks of two kinds (MixFP4, NVINT4, IF4): decoded exactly into the dtype they meet the other operand in, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import FORMATS, QuantConfig
from fp4compile.codegen.kernels import launch
from fp4compile.codegen.reference.block import quantize_ref
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from tests.codegen.kernels.exact_products import Side, exact_side
from tests.codegen.kernels.hard_inputs import first_differences

FORMATS_OF_BYTES = ("mixfp4", "if4")  # NVINT4 is MixFP4 with every block flagged


def flagged_side(kind: str, shape: tuple[int, int], generator: torch.Generator, *, batch: tuple[int, ...] = ()) -> Side:
    """Random codes, scales 0.5 or 1 of either kind: multiples of 1/4 up to 42, whose sums over K = 150 float32 holds."""
    rows, k = shape
    padded = -(-k // 16) * 16
    device = generator.device
    data = torch.randint(0, 256, (*batch, rows, padded // 2), generator=generator, device=device).to(torch.uint8)
    pick = torch.randint(0, 4, (*batch, rows, padded // 16), generator=generator, device=device)
    scales = torch.tensor((0x30, 0x38, 0xB0, 0xB8), dtype=torch.uint8, device=device)[pick]
    made = torch.rand((*batch, rows), generator=generator, device=device) + 0.01
    return Side(data=data, scales=scales.view(FORMATS[kind].scale_dtype), global_scale=made)


def assert_exact(a: Side, b: Side, k: int, bias: Tensor | None = None) -> None:
    got = launch.scaled_mm(*a.arguments(), *b.arguments(), bias, k, torch.float32)
    want = scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, torch.float32)
    assert not first_differences(got, want), first_differences(got, want)


@pytest.mark.parametrize("kind", FORMATS_OF_BYTES)
@pytest.mark.parametrize("left", ["bf16", "fp16", "fp32", "nvfp4", "mxfp4"])
def test_with_every_other_operand(device: torch.device, left: str, kind: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for m, n, k in ((3, 70, 150), (40, 20, 64), (1, 1, 1)):
        high = exact_side(left, (m, k), generator, global_scale="row" if left.endswith("fp4") else "none")
        assert_exact(high, flagged_side(kind, (n, k), generator), k)
        assert_exact(flagged_side(kind, (n, k), generator), high, k)


def test_with_each_other(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    for left in FORMATS_OF_BYTES:
        for right in FORMATS_OF_BYTES:
            assert_exact(flagged_side(left, (5, 40), generator), flagged_side(right, (7, 40), generator), 40)


@pytest.mark.parametrize("kind", FORMATS_OF_BYTES)
@pytest.mark.parametrize("left", [torch.bfloat16, torch.float16], ids=str)
def test_every_product_of_code_and_scale_survives(device: torch.device, left: torch.dtype, kind: str) -> None:
    """All 16 codes under all 2 x 127 finite scales, against 1 in one column: a decoded value that was rounded would show."""
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    bytes_ = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8, device=device)
    packed = torch.zeros(254 * 16, 8, dtype=torch.uint8, device=device)
    packed[:, 0] = codes.repeat(254)
    side = Side(data=packed, scales=bytes_.repeat_interleave(16)[:, None].view(FORMATS[kind].scale_dtype), global_scale=None)
    one = torch.zeros(1, 16, dtype=left, device=device)
    one[0, 0] = 1
    assert_exact(Side(data=one, scales=None, global_scale=None), side, 16)


@pytest.mark.parametrize("kind", FORMATS_OF_BYTES)
def test_a_nan_scale_stays_visible(device: torch.device, kind: str) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    x[1, 20] = torch.inf
    weight = [t.to(device) for t in quantize_ref(x, QuantConfig(format=kind))]
    out = launch.scaled_mm(torch.ones(2, 32, dtype=torch.bfloat16, device=device), None, None, *weight, None, 32, torch.float32)
    assert out.isnan().tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize("kind", FORMATS_OF_BYTES)
def test_grouped(device: torch.device, kind: str) -> None:
    generator = torch.Generator(device).manual_seed(3)
    a, b = exact_side("bf16", (32, 40), generator), flagged_side(kind, (20, 40), generator, batch=(3,))
    offs = torch.tensor([5, 5, 30], dtype=torch.int32, device=device)
    got = launch.scaled_grouped_mm(*a.arguments(), *b.arguments(), offs, 40, torch.float32)
    want = scaled_grouped_mm_ref(*a.arguments(), *b.arguments(), offs, 40, torch.float32)
    assert not first_differences(got, want), first_differences(got, want)

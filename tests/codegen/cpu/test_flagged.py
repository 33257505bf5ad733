"""Blocks of two kinds through every build of the C++ kernels: decoded bit for bit, multiplied in float32."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.cpu import launch
from fp4compile.codegen.formats import FORMATS, QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref

FLAGGED = ("mixfp4", "if4", "nvint4")


@pytest.mark.parametrize("name", [*FLAGGED, "nvfp4"])
def test_every_code_under_every_scale_byte(kernels: launch.Kernels, name: str):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)  # all pairs of codes, 32 blocks a row
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous().view(FORMATS[name].scale_dtype)
    for k in (512, 500, 17, 1):
        found, expected = launch._dequantize(kernels, codes, scales, k), dequantize_ref(codes, scales)[:, :k]
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))


@pytest.mark.parametrize("name", FLAGGED)
@pytest.mark.parametrize("m", [1, 8, 9, 33])
def test_products_are_those_of_the_reference(kernels: launch.Kernels, name: str, m: int):
    """With K = 16 every float32 sum of theirs is exact: 7 bits by 7 bits, or IF4's 9, in 16 terms."""
    g = torch.Generator().manual_seed(0)
    weight = quantize_ref(torch.randn(40, 16, generator=g), QuantConfig(format=name))
    for a in (
        (torch.randint(-8, 9, (m, 16), generator=g).bfloat16(), None, None),
        quantize_ref(torch.randint(-8, 9, (m, 16), generator=g).float(), QuantConfig(global_scale="static", static_amax=2688.0)),
    ):
        found = launch.scaled_mm(*a, *weight, None, 16, torch.float32, kernels=kernels)
        assert torch.equal(found, scaled_mm_ref(*a, *weight, None, 16, torch.float32))
        turned = launch.scaled_mm(*weight, *a, None, 16, torch.float32, kernels=kernels)
        assert torch.allclose(turned, found.mT, rtol=1e-6)

"""The products as sm_80 and sm_90 compute them: every operand with an NVFP4 weight, dequantized operands, groups, against the reference.

Under Triton's interpreter a GPU is only claimed, so the kernels are those of sm_80; `hopper_mm` has no interpreter and needs an sm_90.
"""

from __future__ import annotations

import os

import pytest
import torch

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernels import launch
from fp4compile.codegen.kernels.launch_dequantize import dequantize, tile_on_device
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from fp4compile.codegen.target import Target
from tests.codegen.kernels.exact_products import HIGH_PRECISION, exact_side
from tests.codegen.kernels.hard_inputs import first_differences

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEFTS = ["bf16", "fp16", "fp32", "nvfp4", "mxfp4"]
hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="hopper_mm needs an sm_90; Gluon has no interpreter",
)


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(launch, "known_target", lambda device, where: Target(name="sm_80", device_type="cuda", capability=80))


def weight_of(b, layout: str):
    return lay_out_ref(b.data, b.scales, layout)


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.is_contiguous()
    assert not first_differences(got, want), first_differences(got, want)


@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.TILED])
@pytest.mark.parametrize("left", LEFTS)
def test_a_weight_under_any_rows(device: torch.device, left: str, layout: Layout) -> None:
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((1, 32, 64), (5, 48, 70), (3, 16, 130), (20, 16, 64))
    granularities = (("row", "row"), ("tensor", "tensor"), ("none", "row"), ("row", "none"))
    cases = list(zip(shapes, granularities, strict=True))
    half = (LEFTS.index(left) + (layout == Layout.TILED)) % 2  # interpreted, each shape in one of the layouts
    for (m, n, k), (a_global, b_global) in cases[half::2] if INTERPRETED else cases:
        a = exact_side(left, (m, k), generator, global_scale=a_global)
        b = exact_side("nvfp4", (n, k), generator, global_scale=b_global)
        bias = torch.randn(n, generator=generator, device=device)
        codes, scales = weight_of(b, layout)
        got = launch.scaled_mm(*a.arguments(), codes, scales, b.global_scale, bias, k, torch.float32, b_layout=layout)
        agree(got, scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, torch.float32))


@pytest.mark.parametrize(
    ("shape", "out_dtype"),
    [((12,), torch.bfloat16), ((12,), torch.float32), ((1,), torch.bfloat16), ((), torch.float32), ((3, 4, 12), torch.bfloat16),
     ((4, 1), torch.float32), ((1, 12), torch.bfloat16), ((1, 12), torch.float32), ((3, 1, 1), torch.float32)],
    ids=str,
)  # fmt: skip
def test_any_bias_and_batch(device: torch.device, shape: tuple[int, ...], out_dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(1)
    a, b = exact_side("bf16", (3, 4, 48), generator), exact_side("nvfp4", (12, 48), generator, global_scale="tensor")
    bias = torch.randn(shape, generator=generator, device=device)
    got = launch.scaled_mm(*a.arguments(), *b.arguments(), bias, 48, out_dtype)
    agree(got, scaled_mm_ref(*a.arguments(), *b.arguments(), bias, 48, out_dtype))


def test_a_quantized_batch_with_a_scale_a_matrix(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(2)
    a, b = exact_side("nvfp4", (3, 4, 48), generator, global_scale="tensor"), exact_side("nvfp4", (12, 48), generator, global_scale="row")
    got = launch.scaled_mm(*a.arguments(), *b.arguments(), None, 48, torch.float32)
    agree(got, scaled_mm_ref(*a.arguments(), *b.arguments(), None, 48, torch.float32))


@pytest.mark.parametrize(
    ("left", "right"), [("bf16", "mxfp4"), ("mxfp4", "nvfp4"), ("nvfp4", "bf16"), ("fp16", "nvfp4"), ("nvfp4", "nvfp4")]
)
def test_many_rows_are_dequantized_first(device: torch.device, left: str, right: str) -> None:
    generator = torch.Generator(device).manual_seed(3)
    for batch, m, n, k in (((), 130, 24, 96), ((2,), 70, 40, 50)):
        a = exact_side(left, (*batch, m, k), generator, global_scale="row")
        b = exact_side(right, (*batch, n, k), generator, global_scale="row")
        bias = torch.randn(m, n, generator=generator, device=device)
        got = launch.scaled_mm(*a.arguments(), *b.arguments(), bias, k, torch.bfloat16)
        agree(got, scaled_mm_ref(*a.arguments(), *b.arguments(), bias, k, torch.bfloat16))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_dequantized_values_and_zeros_past_k(device: torch.device, kind: str) -> None:
    generator = torch.Generator(device).manual_seed(4)
    side = exact_side(kind, (2, 19, 320), generator)
    assert side.scales is not None
    dtypes = HIGH_PRECISION["bf16"], HIGH_PRECISION["fp16"]
    for dtype in dtypes if kind == "nvfp4" else dtypes[:1]:
        for data, scales in ((side.data, side.scales), (side.data[:, ::2], side.scales[:, ::2])):
            got = dequantize(data, scales, 301, dtype)
            assert got.shape == (*data.shape[:-1], 304)
            want = dequantize_ref(data, scales)[..., :301]
            assert torch.equal(got[..., :301].float(), want)
            assert not got[..., 301:].any()


def test_tiles_made_on_the_device_are_those_of_the_reference(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(5)
    for shape in ((16, 128), (40, 176), (3, 24, 1040)):
        side = exact_side("nvfp4", shape, generator)
        assert side.scales is not None
        for data, scales in ((side.data, side.scales), (side.data.mT.contiguous().mT, side.scales)):
            codes, tiled = tile_on_device(data, scales)
            want, want_scales = lay_out_ref(data, scales, Layout.TILED)
            assert torch.equal(codes, want)
            assert torch.equal(tiled.view(torch.uint8), want_scales.view(torch.uint8))


@hopper_only
@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.TILED])
@pytest.mark.parametrize("left", ["bf16", "fp16", "nvfp4"])
def test_experts_on_hopper(device: torch.device, left: str, layout: Layout) -> None:
    generator = torch.Generator(device).manual_seed(6)
    for ends in ((0, 3, 3, 9), (70, 300, 301, 301), (0, 0, 0, 0)):
        a = exact_side(left, (305, 320), generator, global_scale="row")
        b = exact_side("nvfp4", (4, 528, 320), generator, global_scale="tensor")
        offs = torch.tensor(ends, dtype=torch.int32, device=device)
        codes, scales = weight_of(b, layout)
        got = launch.scaled_grouped_mm(*a.arguments(), codes, scales, b.global_scale, offs, 320, torch.float32, b_layout=layout)
        agree(got, scaled_grouped_mm_ref(*a.arguments(), *b.arguments(), offs, 320, torch.float32))


@hopper_only
@pytest.mark.parametrize("m", [17, 64, 100, 128, 300, 1000])
def test_two_hundred_runs_on_hopper_give_every_bit(device: torch.device, m: int) -> None:
    generator = torch.Generator(device).manual_seed(m)
    a, b = exact_side("bf16", (m, 2048), generator), exact_side("nvfp4", (1040, 2048), generator, global_scale="row")
    codes, scales = weight_of(b, Layout.TILED)
    want = scaled_mm_ref(*a.arguments(), *b.arguments(), None, 2048, torch.bfloat16)
    for _ in range(200):
        got = launch.scaled_mm(*a.arguments(), codes, scales, b.global_scale, None, 2048, torch.bfloat16, b_layout=Layout.TILED)
        agree(got, want)

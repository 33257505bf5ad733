"""The kernels of `fp4::quantize_residual` against `reference/residual.py`, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from fp4compile.codegen.formats import QuantConfig, round_up
from fp4compile.codegen.kernels import launch_quantize
from fp4compile.codegen.kernels.launch_residual import quantize_residual
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.reference.residual import quantize_residual_ref
from tests.codegen.kernels.hard_inputs import DISTRIBUTIONS, assert_same_bits, hard_batch

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
OPTIONS = [
    {}, {"scale_rule": "four_over_six"}, {"global_scale": "row", "scale_rule": "four_over_six"}, {"global_scale": "row"},
    {"global_scale": "static", "static_amax": 2.0}, {"scale_rule": "four_over_six_mae"}, {"format": "mxfp4"},
]  # fmt: skip


def an_order(k: int, unit: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randperm(k // unit, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)


def assert_exact(x: Tensor, outliers: int, *, axis: int = -1, by_block: bool = False, layout: str = "plain", **options: object) -> None:
    config = QuantConfig(**options)  # type: ignore[arg-type]
    block = config.fmt.block
    padded = round_up(x.shape[axis], block)
    outliers = min(round_up(outliers, block), padded)
    order = an_order(padded, block if by_block else 1, x.device)
    got = quantize_residual(x, axis, order, outliers, config, layout)
    codes, scales, decode = quantize_residual_ref(x, order, outliers, config, axis=axis)
    want = (*lay_out_ref(codes, scales, layout), decode)
    assert_same_bits(got, want)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_on_hard_inputs(device: torch.device, options: dict) -> None:
    index = OPTIONS.index(options)
    names = DISTRIBUTIONS[index % 4 :: 4] if triton.knobs.runtime.interpret else DISTRIBUTIONS
    x = hard_batch(9, 70, DTYPES[index % 3], torch.Generator(device).manual_seed(index), names)
    assert_exact(x, 32, by_block=index % 4 > 1, **options)
    assert_exact(x.mT[-1, :, :33], 16, by_block=index % 4 < 2, axis=-2, **options)


@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 80), (130, 48)], ids=str)
def test_shapes_and_swizzled_scales_with_their_padding(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator(device).manual_seed(1), device=device)
    for dtype, options in zip(DTYPES, ({}, {"global_scale": "row"}, {"format": "mxfp4"}), strict=True):
        assert_exact(x.to(dtype), 16, by_block=dtype is torch.float32, **options)
    assert_exact(x, shape[-1], layout="swizzled")


def test_any_strides_and_no_rows(device: torch.device) -> None:
    x = torch.randn(8, 48, generator=torch.Generator(device).manual_seed(2), device=device)
    for view in (x.t(), x[::2, 3::3], x[:1].expand(5, 48), x[:0], x.view(2, 2, 2, 48)):
        assert_exact(view, 16, by_block=view.ndim > 2 or view.stride(-1) == 1)


def test_more_matrices_than_a_grid_holds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_quantize, "MOST_MATRICES", 4)
    assert_exact(torch.randn(2, 5, 3, 48, device=device).bfloat16(), 16)

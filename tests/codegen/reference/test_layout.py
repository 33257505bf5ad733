"""Memory layouts: every byte where the written formula puts it, the way back, and the operators that read and write them."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.layout import laid_out_shapes, lay_out_ref, plain_ref

SHAPES = [(16, 128), (48, 256), (20, 48), (1, 16), (130, 400)]
BYTES = torch.uint8


def _plain(rows: int, k: int, batch: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (*batch, rows, k // 2), dtype=BYTES)
    return codes, torch.randint(0, 127, (*batch, rows, k // 16), dtype=BYTES).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_every_tiled_byte_lies_where_the_formula_puts_it(rows: int, k: int) -> None:
    codes, scales = _plain(rows, k)
    tiled_codes, tiled_scales = lay_out_ref(codes, scales, "tiled")
    want_codes, want_scales = torch.zeros_like(tiled_codes), torch.zeros_like(tiled_scales.view(BYTES))
    for row in range(rows):
        tile, h, g = row // 16, row % 16 // 8, row % 8
        for byte in range(k // 2):
            want_codes[tile, byte // 64, 512 * h + 64 * g + byte % 64] = codes[row, byte]
        for byte in range(k // 16):
            t, i = byte % 8 // 2, byte % 2
            want_scales[tile, byte // 8, 16 * g + 4 * t + 2 * h + i] = scales.view(BYTES)[row, byte]
    assert torch.equal(tiled_codes, want_codes) and torch.equal(tiled_scales.view(BYTES), want_scales)


@pytest.mark.parametrize("layout", ["swizzled", "tiled"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_the_plain_layout_comes_back(layout: str, batch: tuple[int, ...], rows: int, k: int) -> None:
    codes, scales = _plain(rows, k, batch)
    laid_out = lay_out_ref(codes, scales, layout)
    shapes = laid_out_shapes(rows, k // 2, k // 16, layout)
    assert tuple(t.shape for t in laid_out) == tuple((*batch, *shape) for shape in shapes)
    back_codes, back_scales = plain_ref(*laid_out, layout)
    assert torch.equal(back_codes[..., :rows, : k // 2], codes)
    assert torch.equal(back_scales.view(BYTES)[..., :rows, : k // 16], scales.view(BYTES))
    assert not back_codes[..., rows:, :].any() and not back_codes[..., k // 2 :].any()


@pytest.mark.parametrize("layout", ["swizzled", "tiled"])
@pytest.mark.parametrize("k", [128, 200])
def test_a_product_is_the_same_in_every_layout(layout: str, k: int) -> None:
    config, x, w = QuantConfig(), torch.randn(5, k).bfloat16(), torch.randn(32, k).bfloat16()
    args = ops.quantize_args(config)
    a, b = ops.QUANTIZE(x, -1, *args), ops.QUANTIZE(w, -1, *args)
    laid_out = ops.QUANTIZE(w, -1, *args, layout=layout)
    want = ops.SCALED_MM(*a, *b, None, k, torch.float32)
    assert torch.equal(ops.SCALED_MM(*a, *laid_out, None, k, torch.float32, b_layout=layout), want)
    weight_only = ops.SCALED_MM(x, None, None, *b, None, k, torch.float32)
    assert torch.equal(ops.SCALED_MM(x, None, None, *laid_out, None, k, torch.float32, b_layout=layout), weight_only)


@pytest.mark.parametrize("layout", ["swizzled", "tiled"])
def test_the_fake_operators_know_the_shapes(layout: str) -> None:
    w = torch.randn(3, 32, 100).bfloat16()
    args = (w, -1, *ops.quantize_args(QuantConfig()))
    for fake, real in zip(ops.SHAPE_RULES[ops.QUANTIZE](*args, layout=layout), ops.QUANTIZE(*args, layout=layout), strict=True):
        assert fake.shape == real.shape and fake.dtype == real.dtype
    torch.library.opcheck(ops.QUANTIZE, args, {"layout": layout})

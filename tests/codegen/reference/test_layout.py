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


def _as_kernels_read(eight: list[int]) -> list[int]:
    """Bit by bit: what a turn left by 2 p brings to the sign (bits 15, 31) and the magnitude (6 to 8, 22 to 24) of codes 2 p, 2 p + 1."""
    words = [0, 0]
    for code in range(16):
        nibble, pair, half = eight[code // 2] >> 4 * (code % 2) & 15, code // 2, code % 2
        for bit, place in enumerate((6, 7, 8, 15)):
            source = (place + 16 * half - 2 * pair) % 32
            word = 0 if pair in (0, 2, 5) else 1 if pair in (1, 3, 6) else int(source % 16 not in (0, 1, 9, 10))
            assert not words[word] >> source & 1
            words[word] |= (nibble >> bit & 1) << source
    return [words[i // 4] >> 8 * (i % 4) & 255 for i in range(8)]


@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_every_tiled_byte_lies_where_the_formula_puts_it(rows: int, k: int) -> None:
    codes, scales = _plain(rows, k)
    tiled_codes, tiled_scales = lay_out_ref(codes, scales, "tiled")
    want_codes, want_scales = torch.zeros_like(tiled_codes), torch.zeros_like(tiled_scales.view(BYTES))
    for row in range(rows):
        tile, h, g = row // 16, row % 16 // 8, row % 8
        for block in range(k // 16):
            sixteen = _as_kernels_read(codes[row, 8 * block : 8 * block + 8].tolist())
            want_codes[tile, block // 8, 512 * h + 64 * g + block % 8 * 8 :][:8] = torch.tensor(sixteen, dtype=BYTES)
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

"""The 128x4 scale layout: the written offset formula scale by scale, zero padding, and the way back."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.reference.swizzle import swizzle_ref, unswizzle_ref

SHAPES = [(128, 4), (256, 12), (100, 5), (300, 7), (1, 1), (129, 4), (128, 9), (31, 3)]


def _distinct(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(rows * cols) % 251 + 1).to(torch.uint8).view(rows, cols).view(dtype)


def _padded(rows: int, cols: int) -> tuple[int, int]:
    return -(-rows // 128) * 128, -(-cols // 4) * 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_every_scale_lands_at_the_written_offset(rows: int, cols: int, dtype: torch.dtype):
    scales = _distinct(rows, cols, dtype)
    flat = swizzle_ref(scales)
    assert flat.dtype == dtype and flat.is_contiguous()
    padded_rows, padded_cols = _padded(rows, cols)
    expected = bytearray(padded_rows * padded_cols)
    source = scales.view(torch.uint8).tolist()
    for r in range(rows):
        for c in range(cols):
            block = (r // 128) * (padded_cols // 4) + c // 4
            expected[block * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = source[r][c]
    assert bytes(flat.view(torch.uint8).tolist()) == bytes(expected)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_unswizzle_inverts_swizzle(rows: int, cols: int):
    scales = _distinct(rows, cols, torch.float8_e4m3fn)
    back = unswizzle_ref(swizzle_ref(scales), rows, cols)
    assert back.dtype == scales.dtype
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


def test_a_transposed_view_is_swizzled_by_its_indices():
    scales = _distinct(12, 200, torch.uint8).T
    assert not scales.is_contiguous()
    assert torch.equal(swizzle_ref(scales), swizzle_ref(scales.contiguous()))

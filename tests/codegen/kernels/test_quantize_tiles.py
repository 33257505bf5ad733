"""How matrices are cut up: each case by hand, and tiles that cover what they must."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.kernels.quantize_tiles import ELEMENTS, PAIRS, QUADS, View, steps, tile_of, tile_of_rows


def view_of(x: torch.Tensor, axis: int, aligned: bool = True) -> View:
    return View.of(x.shape, x.stride(), x.element_size(), aligned, axis)


@pytest.mark.parametrize(
    ("x", "axis", "unit", "access"),
    [
        (torch.empty(4, 64, dtype=torch.bfloat16), -1, 16, QUADS),
        (torch.empty(4, 64, dtype=torch.bfloat16), -1, 128, ELEMENTS),  # no whole unit
        (torch.empty(4, 72, dtype=torch.bfloat16)[:, :64], -1, 16, QUADS),
        (torch.empty(4, 68, dtype=torch.bfloat16)[:, :64], -1, 16, ELEMENTS),  # rows begin at multiples of 8 bytes
        (torch.empty(4, 68)[:, :64], -1, 16, QUADS),  # of 16 bytes in float32
        (torch.empty(4, 64, dtype=torch.bfloat16).t(), -2, 16, QUADS),
        (torch.empty(64, 6, dtype=torch.bfloat16), -2, 16, PAIRS),
        (torch.empty(64, 5, dtype=torch.bfloat16), -2, 16, ELEMENTS),  # no pairs
        (torch.empty(64, 6), -2, 16, ELEMENTS),  # no halves
        (torch.empty(8, 8, dtype=torch.bfloat16)[:, ::2], -1, 16, ELEMENTS),
        (torch.empty(3, 4, 64, dtype=torch.bfloat16), -1, 16, QUADS),
    ],
)
def test_what_a_lane_reads(x: torch.Tensor, axis: int, unit: int, access: int) -> None:
    assert view_of(x, axis).access(unit) == access
    assert view_of(x, axis, aligned=False).access(unit) == ELEMENTS


def test_strides_as_the_kernels_take_them() -> None:
    along = view_of(torch.empty(2, 4, 64, dtype=torch.bfloat16), -1)
    assert along.strides(QUADS) == (256, 8, 1)  # 64 elements are 8 times 16 bytes
    across = view_of(torch.empty(64, 6, dtype=torch.bfloat16), -2)
    assert (across.strides(PAIRS), across.constant_stride(PAIRS)) == ((0, 1, 6), 3)


@pytest.mark.parametrize("unit", [16, 32, 64, 128])
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (4096, 14336), (33, 11008), (128, 2880), (8, 1 << 20)])
def test_tiles_are_powers_of_two_and_waste_little(rows: int, k: int, unit: int) -> None:
    x = torch.empty(rows, k, dtype=torch.bfloat16, device="meta")
    units = -(-k // unit)
    for tile in (
        tile_of(view_of(x, -1), unit, rows, units, is_tile=False),
        tile_of_rows(view_of(x, -1), unit, rows, units),
        tile_of(view_of(x.t().contiguous(), -2), unit, rows, units, is_tile=False),
    ):
        assert tile.a & (tile.a - 1) == tile.b & (tile.b - 1) == 0
        assert tile.a * tile.b * unit <= 32768
    along = tile_of(view_of(x, -1), unit, rows, units, is_tile=False)
    assert -(-units // along.b) * along.b <= max(8, units * 9 // 8)
    blocks = tile_of(view_of(x, -1), 16, rows, -(-k // 16), is_tile=True)
    assert blocks.a % 16 == 0


def test_programs_of_a_column_of_tiles() -> None:
    assert steps(1000, 1, 1, 132) == 132
    assert steps(10, 1, 1, 132) == 10
    assert steps(1000, 4, 2, 132) == 16
    assert steps(1000, 500, 1, 132) == 1

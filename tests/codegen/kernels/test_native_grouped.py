"""The native grouped product against its reference, bit for bit, for every way of splitting tokens among experts, on every tile."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.formats import Layout
from fp4compile.codegen.kernels import launch_native_grouped
from fp4compile.codegen.kernels.native_tiles import Architecture, NativeTile
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref
from tests.codegen.kernels.exact_products import Side, exact_side
from tests.codegen.kernels.hard_inputs import first_differences
from tests.codegen.kernels.native_devices import HERE, swizzled

SPLITS = {
    "even": [8, 16, 24, 32],
    "one_takes_all": [0, 32, 32, 32],
    "empty_ends": [0, 20, 32, 32],
    "rows_left_over": [3, 3, 17, 21],
    "no_rows": [0, 0, 0, 0],
    "past_a_tile": [17, 18, 18, 32],
}
TILES = [(architecture, tile) for architecture in HERE for tile in architecture.tiles if tile.swapped]


def assert_exact(
    a: Side, b: Side, offs: torch.Tensor, k: int, out_dtype: torch.dtype = torch.float32, *, layout: str = Layout.PLAIN,
    architecture: Architecture = HERE[0], tile: NativeTile | None = None,
) -> None:  # fmt: skip
    left, right = (a, b) if layout == Layout.PLAIN else (swizzled(a), swizzled(b))
    got = launch_native_grouped.scaled_grouped_mm(
        *left.arguments(), *right.arguments(), offs, k, out_dtype, a_layout=layout, b_layout=layout,
        capability=architecture.capabilities[0], chosen=tile,
    )  # fmt: skip
    want = scaled_grouped_mm_ref(*a.arguments(), *b.arguments(), offs, k, out_dtype)
    assert got.is_contiguous()
    assert not first_differences(got, want), first_differences(got, want)


# Every tile on the hardest splits, every split on one tile.
CASES = [(*each, split) for each in TILES for split in SPLITS if each[1].name == "16 rows" or split in ("rows_left_over", "past_a_tile")]


@pytest.mark.parametrize(("architecture", "tile", "split"), CASES, ids=[f"sm_{a.capabilities[0]}-{t.name}-{s}" for a, t, s in CASES])
def test_every_split(device: torch.device, architecture: Architecture, tile: NativeTile, split: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    offs = torch.tensor(SPLITS[split], dtype=torch.int32, device=device)
    for fmt, k in (("nvfp4", 40), ("mxfp4", 288)):
        a, b = exact_side(fmt, (32, k), generator, global_scale="row"), exact_side(fmt, (4, 20, k), generator, global_scale="tensor")
        for layout in (Layout.PLAIN, Layout.SWIZZLED):
            assert_exact(a, b, offs, k, layout=layout, architecture=architecture, tile=tile)


@pytest.mark.parametrize("granularity", [("none", "none"), ("tensor", "row"), ("row", "none"), ("tensor", "tensor")], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_global_scales(device: torch.device, granularity: tuple[str, str], out_dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(1)
    a = exact_side("nvfp4", (19, 32), generator, global_scale=granularity[0])
    b = exact_side("nvfp4", (3, 200, 32), generator, global_scale=granularity[1])
    offs = torch.tensor([5, 5, 18], dtype=torch.int64, device=device)
    for layout in (Layout.PLAIN, Layout.SWIZZLED):
        assert_exact(a, b, offs, 32, out_dtype, layout=layout)


def test_scales_past_the_last_offset_may_be_anything(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(2)
    a, b = exact_side("nvfp4", (9, 32), generator, global_scale="row"), exact_side("nvfp4", (2, 6, 32), generator)
    assert a.global_scale is not None
    a.global_scale[7:] = float("nan")
    assert_exact(a, b, torch.tensor([3, 7], dtype=torch.int32, device=device), 32)


@pytest.mark.parametrize("experts", [1, 2, 5, 16])
def test_numbers_of_experts(device: torch.device, experts: int) -> None:
    generator = torch.Generator(device).manual_seed(experts)
    total = 5 * experts
    offs = torch.randint(0, total + 1, (experts,), generator=generator, device=device, dtype=torch.int32).sort().values
    a, b = exact_side("nvfp4", (total, 16), generator), exact_side("nvfp4", (experts, 6, 16), generator, global_scale="tensor")
    assert_exact(a, b, offs, 16)
    assert_exact(a, b, torch.stack([offs, offs], dim=1)[:, 0], 16)  # offsets need not be contiguous


def test_nothing_to_multiply(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(3)
    for total, groups in ((0, 2), (4, 0)):
        a, b = exact_side("nvfp4", (total, 16), generator), exact_side("nvfp4", (groups, 6, 16), generator)
        assert_exact(a, b, torch.zeros(groups, dtype=torch.int32, device=device), 16)


def test_the_tile_follows_the_mean_number_of_tokens() -> None:
    for architecture in HERE:
        widths = [launch_native_grouped.grouped_tile(architecture, mean).block_c for mean in (1, 9, 17, 33, 65, 129, 5000)]
        assert widths[1:] == [16, 32, 64, 128, 128, 128]

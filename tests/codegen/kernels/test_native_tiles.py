"""The choice among the native tiles: few rows take narrow ones, k is split where tiles are fewer than SMs, an unlisted device gets none."""

from __future__ import annotations

import pytest

from fp4compile.codegen.kernels.native_tiles import ARCHITECTURES, MMA_SYNC, TCGEN05, Architecture, Plan, architecture_of, clocks, plan
from fp4compile.codegen.registry import FAMILIES


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a.capabilities[0]}")
def test_few_rows_are_not_padded_to_128(architecture: Architecture) -> None:
    for m in (1, 4, 8, 16, 32, 64):
        for n, k in ((4096, 4096), (14336, 4096), (28672, 8192)):
            tile = plan(architecture, m, n, k).tile
            assert tile.swapped and -(-m // tile.block_c) * tile.block_c < max(2 * m, 17), (m, n, k, tile)


def test_many_rows_take_the_largest_tile() -> None:
    assert plan(TCGEN05, 8192, 8192, 8192).tile.name == "128x256"
    assert plan(MMA_SYNC, 8192, 8192, 8192).tile.name == "128x128"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a.capabilities[0]}")
def test_k_is_split_only_where_tiles_leave_processors_idle(architecture: Architecture) -> None:
    assert plan(architecture, 1, 1024, 16384).splits > 1
    assert plan(architecture, 1, 1024, 16384, may_split=False).splits == 1
    assert plan(architecture, 4096, 4096, 4096).splits == 1
    assert plan(architecture, 1, 4096, 256).splits == 1


def test_the_plan_is_the_cheapest() -> None:
    for m, n, k in ((1, 4096, 4096), (100, 4096, 4096), (300, 1000, 8192), (4096, 4096, 4096)):
        best = clocks(TCGEN05, plan(TCGEN05, m, n, k), m, n, k, 1, 148)
        assert all(best <= clocks(TCGEN05, Plan(tile=tile, splits=1), m, n, k, 1, 148) for tile in TCGEN05.tiles)


def test_architectures() -> None:
    assert architecture_of(100) is architecture_of(103) is TCGEN05
    assert architecture_of(120) is architecture_of(121) is MMA_SYNC
    assert architecture_of(90) is None
    listed = {c for family in FAMILIES if family.name.startswith(("triton tcgen05", "triton mma.sync")) for c in family.capabilities}
    assert listed == {c for architecture in ARCHITECTURES for c in architecture.capabilities}


def test_names_are_unique() -> None:
    for architecture in ARCHITECTURES:
        names = [tile.name for tile in architecture.tiles]
        assert len(set(names)) == len(names)
        assert all(architecture.named(name).name == name for name in names)

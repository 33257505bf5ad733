"""The search over tiles of NVFP4 weights, with the kernels and the clock replaced: what is taken, refused, and not asked again."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen import tuning
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.kernels import search_decode
from fp4compile.codegen.kernels.decode_mm import KINDS, NarrowTile, WideTile, choose_tile, key_of
from fp4compile.codegen.kernels.hopper_tiles import HalfTile, HopperTile, RegisterTile
from fp4compile.codegen.kernels.search_decode import candidates, search
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.layout import plain_ref

CPU = torch.device("cpu")
SPEC = KernelSpec(op="scaled_mm", lhs=None, rhs=QuantConfig(), dtype=torch.bfloat16)
BEST = NarrowTile(row_tiles=2, warps_k=4)
WRONG = NarrowTile(warps_r=2, warps_k=2)  # the fastest of all, and wrong
BROKEN = NarrowTile(warps_r=2, warps_k=4)
PROCESSORS = 132


@pytest.fixture
def launched(monkeypatch, tmp_path) -> list:
    tiles: list = []

    def decode_mm(x, codes, scales, b_global, bias, out_dtype, *, n, tile):
        tiles.append(tile)
        if tile == BROKEN:
            raise RuntimeError("out of resources: shared memory")
        codes, scales = plain_ref(codes, scales, "tiled") if codes.ndim == 3 else (codes, scales)
        out = x.float() @ dequantize_ref(codes, scales)[:n].mT
        return (out * (1.01 if tile == WRONG else 1.0)).to(out_dtype)

    def microseconds(calls, device, effort) -> float:
        assert len(calls) >= 2
        return {WRONG: 0.5, BEST: 1.0}.get(calls[0].keywords["tile"], 2.0)

    monkeypatch.setattr(search_decode, "decode_mm", decode_mm)
    monkeypatch.setattr(search_decode, "microseconds", microseconds)
    monkeypatch.setattr(search_decode, "processors_of", lambda device: PROCESSORS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    tuning._lookup.cache_clear()
    yield tiles
    tuning._lookup.cache_clear()


def test_the_fastest_right_tile_is_recorded_under_what_a_launch_asks_for(launched) -> None:
    search(SPEC, 1, 48, 120, CPU)
    assert tuning.lookup(CPU, key_of(1, 48, 128, torch.bfloat16, tiled=True), KINDS) == BEST
    assert {*candidates(1, 128, 90), choose_tile(1, 48, 128, True)} == set(launched)


@pytest.mark.parametrize(("n", "k", "padded"), [(47, 128, 128), (48, 40, 48)])
def test_a_weight_that_stays_plain_is_searched_plain(launched, n, k, padded) -> None:
    search(SPEC, 1, n, k, CPU)
    assert tuning.lookup(CPU, key_of(1, n, padded, torch.bfloat16, tiled=False), KINDS) == BEST


def test_a_quantized_left_side_is_searched_as_the_bfloat16_it_becomes(launched) -> None:
    search(KernelSpec(op="scaled_mm", lhs=QuantConfig(), rhs=QuantConfig(), dtype=torch.float32), 1, 48, 128, CPU)
    assert tuning.lookup(CPU, key_of(1, 48, 128, torch.bfloat16, tiled=True), KINDS) == BEST


def test_what_was_found_is_not_searched_again(launched) -> None:
    search(SPEC, 1, 48, 128, CPU)
    launched.clear()
    search(SPEC, 1, 48, 128, CPU)
    assert launched == []
    search(SPEC, 2, 48, 128, CPU)
    assert launched


def test_what_the_kernels_do_not_serve_is_not_searched(launched, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    search(SPEC, 129, 48, 128, CPU)
    assert launched == []


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 64, 128, 4096])
def test_candidates_are_few_and_made_for_their_rows_and_device(m, capability) -> None:
    tiles = list(candidates(m, 8192, capability))
    assert len(tiles) <= 32 and len(set(tiles)) == len(tiles)
    assert tiles or capability != 90
    for tile in tiles:
        if isinstance(tile, NarrowTile):
            assert m <= 8 * tile.column_tiles <= m + 7
        elif isinstance(tile, WideTile):
            assert capability == 80 and m <= 128
            assert tile.stages * tile.chunks * (72 * tile.block_n + 256 * tile.block_m) <= 227 * 1024
        else:
            assert isinstance(tile, (RegisterTile, HopperTile, HalfTile)) and capability == 90


def test_k_is_not_split_into_crumbs() -> None:
    assert {tile.splits for tile in candidates(64, 512, 90) if isinstance(tile, (RegisterTile, HopperTile))} == {1}
    assert {tile.splits for tile in candidates(64, 2048, 90) if isinstance(tile, (RegisterTile, HopperTile))} == {1, 2, 4}

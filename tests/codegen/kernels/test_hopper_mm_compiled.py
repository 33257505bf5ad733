"""The Hopper kernel in every tile that may be chosen, compiled for sm_90: it fits, spills nothing, and leaves no register in flight."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from fp4compile.codegen.kernels.hopper_mm import hopper_mm_kernel
from fp4compile.codegen.kernels.hopper_tiles import TILES, HopperTile, choose_hopper_tile
from fp4compile.codegen.kernels.launch_hopper import multiply_groups_hopper, multiply_hopper, x_descriptor
from tests.codegen.kernels.cross_compiled import launches_of, under_3_6, usage

SHARED_MEMORY = 227 * 1024
N, K = 512, 512
NAMES = [f"{tile.block_m}x{tile.block_n}" for tile in TILES]


def weight(*groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.zeros(*groups, N // 16, K // 128, 1024, dtype=torch.uint8)
    return codes, torch.zeros(*groups, N // 16, K // 128, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)


def plain(tile: HopperTile, dtype: torch.dtype) -> Callable[[], object]:
    x, out = torch.zeros(512, K, dtype=dtype), torch.zeros(512, N, dtype=dtype)
    return lambda: multiply_hopper(x, *weight(), None, torch.ones(()), None, out, tile)


def scaled(tile: HopperTile) -> Callable[[], object]:
    x, out = torch.zeros(512, K, dtype=torch.bfloat16), torch.zeros(512, N)
    return lambda: multiply_hopper(x, *weight(), torch.ones(512), torch.ones(N), torch.zeros(N), out, tile)


def grouped(tile: HopperTile) -> Callable[[], object]:
    x, out = torch.zeros(512, K, dtype=torch.bfloat16), torch.zeros(512, N, dtype=torch.bfloat16)
    return lambda: multiply_groups_hopper(
        x, *weight(4), torch.ones(512), torch.ones(4, N), torch.zeros(4, dtype=torch.int32), out, tile
    )  # fmt: skip


SPILLED = {("scaled", "64x256"): under_3_6(16), ("scaled", "256x128"): under_3_6(32)}


@pytest.mark.parametrize("tile", TILES, ids=NAMES)
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "scaled", "grouped"])
def test_fits_spills_nothing_and_leaves_no_register_in_flight(
    kind: str, tile: HopperTile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    call = scaled(tile) if kind == "scaled" else grouped(tile) if kind == "grouped" else plain(tile, getattr(torch, kind))
    launch = next(each for each in launches_of(call, monkeypatch) if each.kernel is hopper_mm_kernel)
    compiled = launch.compile(90)
    used = usage(compiled, tmp_path)
    spilled = SPILLED.get((kind, NAMES[TILES.index(tile)]), 0)
    assert used["STACK"] <= spilled and used["LOCAL"] == 0, used
    assert compiled.metadata.shared <= SHARED_MEMORY
    ptx = compiled.asm["ptx"]
    multiplies = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", ptx)
    assert multiplies
    assert all(left == "%" for left in multiplies)  # a descriptor of shared memory; registers would stand in braces
    assert "cp.async.bulk.tensor" in ptx


def test_two_of_the_tiles_for_few_rows_share_a_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = next(each for each in launches_of(plain(TILES[0], torch.bfloat16), monkeypatch)).compile(90)
    assert 2 * (compiled.metadata.shared + 1024) <= 228 * 1024
    assert TILES[0].most_registers is not None
    assert 2 * 32 * (TILES[0].warps + TILES[0].decode_warps) * TILES[0].most_registers <= 65536


def test_only_tiles_that_were_compiled_are_chosen() -> None:
    for m, n, k in itertools.product((17, 64, 65, 128, 129, 4096), (64, 4096, 14336, 28672), (128, 1024, 8192)):
        tile = choose_hopper_tile(m, n, k, 132)
        assert any(tile == HopperTile(**{**vars(each), "splits": tile.splits}) for each in TILES)
        assert tile.splits == 1 or k // tile.splits >= 512


def test_any_rows_of_x_become_what_the_copy_engine_takes() -> None:
    base = torch.arange(64 * 128, dtype=torch.float32).view(64, 128).bfloat16()
    for x in (base, base[:, :100], base[::2], base.T, base[:1].expand(5, 128), base[:, 3:], base[3:4, ::2], base[:, 0:1].T, base[:, :9]):
        found = x_descriptor(x, 64)
        assert found.shape == list(x.shape)
        assert found.strides[0] % 8 == 0 and found.strides[0] >= x.shape[1]
        assert torch.equal(found.base.as_strided(x.shape, (found.strides[0], 1)), x)
    assert x_descriptor(base[:, :96], 64).base.data_ptr() == base.data_ptr()

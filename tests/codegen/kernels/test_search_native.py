"""The search among native tiles: candidates are sensible, a wrong tile is not taken, a recorded winner is what a launch then takes."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen import tuning
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.kernels import launch_native, search_native
from fp4compile.codegen.kernels.launch_native import Winner, key_of
from fp4compile.codegen.kernels.native_tiles import ARCHITECTURES, TCGEN05, Architecture, plan
from fp4compile.codegen.reference.layout import plain_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref

CPU = torch.device("cpu")
SPEC = KernelSpec(op="scaled_mm", lhs=QuantConfig(), rhs=QuantConfig(), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of an sm_100, with a table of its own."""
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(search_native, "processors_of", lambda device: 148)
    monkeypatch.setattr(search_native, "copies_for", lambda size, device: 2)
    tuning._lookup.cache_clear()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a.capabilities[0]}")
def test_candidates_begin_with_the_plan_and_fit_the_rows(architecture: Architecture) -> None:
    for m, n, k in ((1, 4096, 4096), (32, 4096, 256), (100, 1000, 8192), (8192, 8192, 8192)):
        found = list(search_native.candidates(architecture, m, n, k, architecture.processors))
        assert found[0] == Winner.of(plan(architecture, m, n, k))
        assert len(found) == len(set(found)) <= 24
        for winner in found[1:]:
            tile = winner.plan(architecture).tile
            assert winner.splits * tile.block_k <= max(k, tile.block_k)
            assert not tile.persistent or winner.splits == 1


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_the_fastest_right_tile_is_recorded(monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    clocks = {"64 rows": 3.0, "128x128 split": 1.0, "128x128": 2.0}

    def product(a, a_scales, a_global, b, b_scales, b_global, bias, k, out_dtype, *, chosen, a_layout, b_layout, **_):
        wrong = 2.0 if chosen.tile.name == "128x128 split" else 1.0  # the fastest of all
        plain = *plain_ref(a, a_scales, a_layout), None, *plain_ref(b, b_scales, b_layout), None
        return wrong * scaled_mm_ref(*plain, bias, k, out_dtype)

    def clock(calls, device, effort) -> float:
        winner: Winner = calls[0].args[1]
        return clocks.get(winner.name, 9.0) + winner.splits

    monkeypatch.setattr(launch_native, "scaled_mm", product)
    monkeypatch.setattr(search_native, "microseconds", clock)
    config = QuantConfig(format=fmt)
    search_native.search(KernelSpec(op="scaled_mm", lhs=config, rhs=config, dtype=torch.bfloat16), 100, 100, 600, CPU)
    key = key_of(100, 100, 600, config.fmt.block)
    assert tuning.lookup(CPU, key, (Winner,)) == Winner(name="128x128", splits=1)
    # A second search has nothing to do.
    monkeypatch.setattr(search_native, "candidates", None)
    search_native.search(KernelSpec(op="scaled_mm", lhs=config, rhs=config, dtype=torch.bfloat16), 100, 100, 600, CPU)


def test_grouped_products_and_other_devices_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_native, "candidates", None)
    search_native.search(KernelSpec(op="scaled_grouped_mm", lhs=QuantConfig(), rhs=QuantConfig(), dtype=torch.bfloat16), 8, 100, 600, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    search_native.search(SPEC, 8, 100, 600, CPU)


def test_a_launch_takes_the_winner_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    codes, scales = torch.zeros(8, 64, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8).view(torch.float8_e4m3fn)
    side = launch_native.NativeOperand.of(codes, scales, None, "plain", torch.Size(()), 128)
    side = launch_native.NativeOperand(
        codes=side.codes.as_subclass(OnCuda), scales=scales, layout="plain", global_scale=None, rows=8, matrices=1, block=16
    )
    tuning.record(CPU, key_of(8, 8, 128, 16), Winner(name="32 rows", splits=2), 1.0)
    bias = torch.zeros(1, 8, 8)
    planned = launch_native._planned(TCGEN05, side, side, None, 128, 1, 148)
    assert (planned.tile.name, planned.splits) == ("32 rows", 2)
    tuning.record(CPU, key_of(8, 8, 128, 16), Winner(name="of an older release", splits=1), 1.0)
    assert launch_native._planned(TCGEN05, side, side, None, 128, 1, 148).tile in TCGEN05.tiles
    tuning.record(CPU, key_of(8, 8, 128, 16), Winner(name="32 rows", splits=2), 1.0)
    # A bias of each element cannot be added where parts are summed.
    planned = launch_native._planned(TCGEN05, side, side, bias, 128, 1, 148)
    assert planned.splits == 1

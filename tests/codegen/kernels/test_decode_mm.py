"""The decode products: bit for bit where float32 sums are exact, near float64 elsewhere, in both layouts of the weight, on every target.

Without a GPU the first test runs this file again under Triton's interpreter; the compiled kernels are read in `test_decode_mm_compiled.py`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.errors import UnsupportedDtype
from fp4compile.codegen.kernels.decode_mm import NarrowTile, WideTile, choose_tile, decode_mm, supports, tile_weight
from fp4compile.codegen.kernels.hopper_tiles import REGISTER_TILES, HalfTile, RegisterTile, choose_register_tile
from fp4compile.codegen.reference.block import dequantize_ref
from fp4compile.codegen.reference.matmul import scaled_mm_ref
from tests.codegen.kernels.exact_products import HIGH_PRECISION, Side, exact_side
from tests.codegen.kernels.hard_inputs import first_differences

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; the interpreter is run apart")

NARROW = NarrowTile(steps=2, row_tiles=2, column_tiles=1, warps_r=2, warps_k=2)
WIDE = WideTile(block_n=64, block_m=16, chunks=1, stages=2, warps=4)
WIDE_LONG = WideTile(block_n=128, block_m=16, chunks=2, stages=2, warps=4)
TILES = {"narrow": NARROW, "wide": WIDE, "wide-long": WIDE_LONG, "chosen": None}
# Each kind of x with each tile, and each of both with either layout: what is decoded does not depend on all three at once.
PAIRWISE = [(i + j, kind, tile, bool((i + j) % 2)) for i, kind in enumerate(HIGH_PRECISION) for j, tile in enumerate(TILES.values())]
IDS = [f"{kind}-{name}-{'tiled' if (i + j) % 2 else 'plain'}" for i, kind in enumerate(HIGH_PRECISION) for j, name in enumerate(TILES)]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="kernels run in this very process")
def test_this_file_passes_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # -P: the repository root on sys.path would hide the installed package behind its own folders.
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=os.path.dirname(__file__))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def weight_of(side: Side, tiled: bool) -> tuple[Tensor, Tensor]:
    assert side.scales is not None
    return tile_weight(side.data, side.scales) if tiled else (side.data, side.scales)


@runs_kernels
@pytest.mark.parametrize(("index", "kind", "tile", "tiled"), PAIRWISE, ids=IDS)
def test_every_bit_where_sums_are_exact(
    device: torch.device, index: int, kind: str, tile: NarrowTile | WideTile | None, tiled: bool
) -> None:  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((1, 40, 64), (3, 33, 160), (11, 70, 290))
    for turn, (m, n, k) in enumerate(shapes[:2] if kind == "fp32" else shapes):  # float32 is three rows of bfloat16 each
        x, weight = exact_side(kind, (m, k), generator).data, exact_side("nvfp4", (n, k), generator, global_scale="row")
        bias = torch.randn(n, generator=generator, device=device)
        number = None if kind == "fp32" else torch.tensor(0.3, device=device)
        b_global = (weight.global_scale, number)[(turn + index) % 2]
        want = scaled_mm_ref(x, None, None, weight.data, weight.scales, b_global, bias, k, x.dtype)
        got = decode_mm(x, *weight_of(weight, tiled), b_global, bias, x.dtype, n=n, tile=tile)
        assert not first_differences(got, want), first_differences(got, want)


@runs_kernels
@pytest.mark.parametrize("tile", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code_under_every_scale(device: torch.device, dtype: torch.dtype, tile: NarrowTile | WideTile) -> None:
    """One-hot rows of x read the dequantized weight out, and every such value is exact in either half type times 2^7 or 2^-8."""
    pairs = torch.tensor([low | (low + 1) << 4 for low in range(0, 16, 2)], dtype=torch.uint8, device=device)
    scales = torch.arange(256, dtype=torch.uint8, device=device)[:, None].repeat(1, 4).view(torch.float8_e4m3fn)
    codes = pairs.repeat(256, 4)
    x = torch.eye(16, 64, dtype=dtype, device=device)
    for layout in ((codes, scales), tile_weight(codes, scales)):
        got = decode_mm(x, *layout, None, None, torch.float32, tile=tile)
        want = dequantize_ref(codes, scales)[:, :16].mT.contiguous()
        nan = want.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got[~nan], want[~nan])


@runs_kernels
@pytest.mark.parametrize("tile", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("tiled", [False, True], ids=["plain", "tiled"])
def test_a_nan_scale_makes_its_row_nan_and_no_other(device: torch.device, tile: NarrowTile | WideTile, tiled: bool) -> None:
    generator = torch.Generator(device).manual_seed(1)
    weight = exact_side("nvfp4", (40, 256), generator)
    assert weight.scales is not None
    weight.scales.view(torch.uint8)[[3, 12, 39], [0, 15, 6]] = torch.tensor([0x7F, 0xFF, 0x7F], dtype=torch.uint8, device=device)
    x = torch.zeros(3, 256, dtype=torch.bfloat16, device=device)
    out = decode_mm(x, *weight_of(weight, tiled), None, None, torch.bfloat16, n=40, tile=tile)
    assert out.isnan().all(0).nonzero().flatten().tolist() == [3, 12, 39]
    assert out.isnan().sum() == 9


@runs_kernels
@pytest.mark.parametrize("kind", list(HIGH_PRECISION))
def test_near_float64_over_the_whole_range_of_x(device: torch.device, kind: str) -> None:
    """At most K 2^-23 of the sum of magnitudes, whatever the magnitude of a row; infinities and NaN pass through."""
    generator = torch.Generator(device).manual_seed(2)
    k = 320
    weight = exact_side("nvfp4", (32, k), generator)
    assert weight.scales is not None
    exponents = torch.tensor([-100.0, 0.0, 100.0] if kind != "fp16" else [-10.0, 0.0, 4.0], device=device)
    x = (torch.randn(3, k, generator=generator, device=device) * 2.0 ** exponents[:, None]).to(HIGH_PRECISION[kind])
    values = dequantize_ref(weight.data, weight.scales).double()
    for tile in (NARROW, WIDE):
        got = decode_mm(x, weight.data, weight.scales, None, None, torch.float32, tile=tile).double()
        bound = (k + 8) * 2.0**-23 * (x.double().abs() @ values.abs().mT)
        assert ((got - x.double() @ values.mT).abs() <= bound).all()
        special = x.clone()
        special[0, 7], special[1, 9] = float("inf"), float("nan")
        want = special.float() @ values.float().mT
        got = decode_mm(special, weight.data, weight.scales, None, None, torch.float32, tile=tile)
        assert torch.equal(got.isfinite(), want.isfinite())
        assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1, 64, 64, torch.bfloat16, 90), None),
        ((128, 64, 64, torch.float16, 80), None),
        ((42, 64, 64, torch.float32, 90), None),
        ((42, 64, 64, torch.float32, 80), None),
        ((43, 64, 64, torch.float32, 80), "M=43"),
        ((128, 64, 64, torch.float32, 90), None),
        ((129, 64, 64, torch.float32, 90), "M=129"),
        ((8, 64, 64, torch.float16, 89), None),
        ((9, 64, 64, torch.float16, 89), "shared memory"),
        ((129, 64, 64, torch.bfloat16, 80), "M=129"),
        ((16384, 64, 64, torch.bfloat16, 90), None),
        ((1, 64, 64, torch.float64, 90), "float64"),
        ((8, 64, 64, torch.bfloat16, 100), None),
        ((9, 64, 64, torch.bfloat16, 120), "sm_120"),
        ((1, 64, 64, torch.bfloat16, 75), "sm_75"),
        ((1, 0, 64, torch.bfloat16, 90), "empty"),
    ],
    ids=str,
)
def test_what_is_supported(arguments: tuple, reason: str | None) -> None:
    found = supports(*arguments)
    assert found is None if reason is None else reason in (found or "")


def test_few_rows_stay_out_of_shared_memory_and_many_share_it() -> None:
    for capability in (80, 90):
        assert isinstance(choose_tile(1, 28672, 8192, True, capability), NarrowTile)
    assert isinstance(choose_tile(64, 28672, 8192, True, 80), WideTile)


def test_on_hopper_no_dot_takes_its_left_operand_from_registers() -> None:
    for m, n, k in itertools.product((1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 4096), (64, 4096, 14336, 28672), (64, 1024, 8192)):
        assert not isinstance(choose_tile(m, n, k, True, 90), WideTile)


def test_on_hopper_many_rows_meet_a_weight_that_was_dequantized_once_where_it_is_not_tiled() -> None:
    assert isinstance(choose_tile(8192, 11008, 4096, False, 90), HalfTile)
    assert choose_tile(640, 640, 65536, False, 90) == choose_register_tile(640, 640, 65536, 132)  # wgrad of a narrow layer: 15 tiles
    assert choose_register_tile(640, 640, 65536, 132).splits == 8 and isinstance(choose_tile(640, 640, 640, False, 90), HalfTile)
    for m, n, k in itertools.product((17, 64, 65, 128, 129, 4096), (64, 4096, 14336, 28672), (128, 1024, 8192)):
        tile = choose_tile(m, n, k, True, 90)
        if isinstance(tile, RegisterTile):
            assert replace(tile, splits=1) in REGISTER_TILES
            assert tile.splits == 1 or k // tile.splits >= 512


def test_a_dtype_without_kernels_is_refused() -> None:
    weight = exact_side("nvfp4", (8, 32), torch.Generator().manual_seed(3))
    assert weight.scales is not None
    with pytest.raises(UnsupportedDtype, match="float64"):
        decode_mm(torch.zeros(1, 32, dtype=torch.float64), weight.data, weight.scales, None, None, torch.float32)

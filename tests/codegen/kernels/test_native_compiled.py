"""The native products as compiled for GPUs this machine lacks: each row of the table has its MMA, TMA and scale copies, and no spills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import triton

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
from fp4compile.codegen.kernels.native_tiles import ARCHITECTURES, TCGEN05, Architecture, NativeTile
from tests.codegen.kernels.cross_compiled import launches_of
from tests.codegen.kernels.native_cases import HEAVIEST, RAGGED, USUAL, Epilogue, native_grouped_product, native_product
from tests.codegen.kernels.sass import MachineCode, machine_code, multiplications

VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
TILES = [(architecture, tile) for architecture in ARCHITECTURES for tile in architecture.tiles]
NAMES = [f"sm_{architecture.capabilities[0]}-{tile.name}" for architecture, tile in TILES]


def compiled(
    architecture: Architecture, tile: NativeTile, fmt: str, epilogue: Epilogue, capability: int, patch: pytest.MonkeyPatch, folder: Path
) -> MachineCode:
    launches = launches_of(native_product(architecture, tile, fmt, epilogue), patch)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["native_mm_kernel"]
    return machine_code(launches[0].compile(capability), folder)


def assert_fits(code: MachineCode, architecture: Architecture) -> None:
    # ptxas of Triton 3.6 writes 8 bytes of stack at each TMA load on sm_120 and never reads them.
    assert code.local == 0 and code.count("LDL") == 0
    assert code.stack <= (8 if VERSION < (3, 7) and architecture is not TCGEN05 else 0)
    assert code.registers <= 255
    assert code.shared <= architecture.shared_memory
    assert code.tensor_memory <= 512


def assert_native(code: MachineCode, architecture: Architecture, tile: NativeTile, *, gathered: bool = False) -> None:
    assert code.count("UTMALDG")
    loop = code.main_loop()
    if architecture is TCGEN05:
        # 64 columns of k an instruction. Triton may have a second copy of the loop's body for the last turns.
        assert loop["UTCOMMA"] == tile.block_k // 64
        copied = (tile.block_r + (tile.block_c if tile.block_c >= 128 and not gathered else 0)) // 128
        assert loop["UTCCP"] % copied == 0 and loop["UTCCP"]
    else:
        assert loop["OMMA"] == tile.block_r * tile.block_c * tile.block_k // (16 * 8 * 64 * code.warps)
    assert multiplications(loop) == loop["UTCOMMA"] + loop["OMMA"]


@pytest.mark.parametrize(("architecture", "tile"), TILES, ids=NAMES)
def test_every_tile_multiplies_natively_and_fits(
    architecture: Architecture, tile: NativeTile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = compiled(architecture, tile, "nvfp4", USUAL, architecture.capabilities[0], monkeypatch, tmp_path)
    assert_fits(code, architecture)
    assert_native(code, architecture, tile)
    # Tiles of whole scale blocks leave by TMA, too.
    assert bool(code.count("UTMASTG")) is not tile.swapped


@pytest.mark.parametrize("epilogue", [HEAVIEST, RAGGED], ids=lambda e: e.name)
@pytest.mark.parametrize(("architecture", "tile"), TILES, ids=NAMES)
def test_no_epilogue_spills(
    architecture: Architecture, tile: NativeTile, epilogue: Epilogue, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert_fits(compiled(architecture, tile, "nvfp4", epilogue, architecture.capabilities[0], monkeypatch, tmp_path), architecture)


@pytest.mark.parametrize(("architecture", "tile"), [(a, t) for a, t in TILES if t.swapped], ids=[n for n in NAMES if "rows" in n])
def test_grouped_products(architecture: Architecture, tile: NativeTile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launches = launches_of(native_grouped_product(architecture, tile, "nvfp4"), monkeypatch)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["native_grouped_mm_kernel"]
    code = machine_code(launches[0].compile(architecture.capabilities[0]), tmp_path)
    assert_fits(code, architecture)
    assert_native(code, architecture, tile, gathered=True)


@pytest.mark.parametrize(("architecture", "tile"), TILES, ids=NAMES)
def test_mxfp4_on_the_younger_target(architecture: Architecture, tile: NativeTile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if architecture is not TCGEN05 and VERSION < (3, 8):
        pytest.skip(f"Triton {triton.__version__} fails on tl.dot_scaled for sm_121; 3.8 compiles it")
    if architecture is TCGEN05 and VERSION < (3, 7):
        pytest.skip(f"nvdisasm of Triton {triton.__version__} does not read sm_103; 3.7 does")
    code = compiled(architecture, tile, "mxfp4", USUAL, architecture.capabilities[1], monkeypatch, tmp_path)
    assert_fits(code, architecture)
    assert_native(code, architecture, tile)

"""The product of halves for many rows, compiled for sm_90: it fits, spills nothing, and multiplies from shared memory alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from fp4compile.codegen.kernels.hopper_tiles import HALF_TILES, HalfTile
from fp4compile.codegen.kernels.launch_half_hopper import multiply_halves_hopper
from tests.codegen.kernels.cross_compiled import launches_of
from tests.codegen.kernels.sass import machine_code

SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize("tile", HALF_TILES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fits_and_spills_nothing(tile: HalfTile, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a, out = torch.zeros(512, 512, dtype=torch.bfloat16), torch.zeros(512, 512, dtype=out_dtype)
    call = launches_of(lambda: multiply_halves_hopper(a, a, torch.ones(512), torch.ones(512), torch.zeros(512), out, tile), monkeypatch)[0]
    compiled = call.compile(90)
    code = machine_code(compiled, tmp_path)
    assert code.stack == code.local == 0
    assert code.shared <= SHARED_MEMORY
    assert all(left == "%" for left in re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", compiled.asm["ptx"]))
    assert code.main_loop()["HGMMA"] == 4 * tile.block_m // 128
    assert ("UTMASTG" in {each.base for each in code.instructions if not isinstance(each, str)}) == (out_dtype is torch.bfloat16)

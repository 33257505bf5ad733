"""The decode kernels as compiled for GPUs this machine lacks: no spills, no value moved between threads in the loop, the right MMA."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4compile.codegen.kernels.decode_mm import choose_tile, decode_mm, tile_weight

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
from tests.codegen.kernels.cross_compiled import CUOBJDUMP, Launch, launches_of, under_3_6, usage

CASES = [  # m, n, k, dtype, tiled
    (1, 28672, 8192, torch.bfloat16, True),
    (1, 4096, 4096, torch.bfloat16, False),
    (8, 14336, 4096, torch.float16, True),
    (16, 4096, 4096, torch.bfloat16, True),
    (16, 4096, 4096, torch.float16, False),
]
MORE_ROWS = [
    (32, 28672, 8192, torch.bfloat16, False),
    (64, 28672, 8192, torch.bfloat16, True),
    (128, 28672, 8192, torch.bfloat16, True),
]


def product(m: int, n: int, k: int, dtype: torch.dtype, tiled: bool, capability: int, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """The launch of the product, as a GPU would get it; memory of these sizes is never touched."""
    codes, scales = torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    if tiled:
        codes, scales = codes.view(n // 16, k // 128, 1024), scales.view(n // 16, k // 128, 128)
        assert [t.shape for t in tile_weight(codes.view(n, -1)[:16], scales.view(n, -1)[:16])] == [codes[:1].shape, scales[:1].shape]
    x = torch.empty(m, k, dtype=dtype)
    tile = choose_tile(m, n, k, tiled, capability)
    last = launches_of(lambda: decode_mm(x, codes, scales, torch.ones(()), torch.zeros(n), dtype, tile=tile), monkeypatch)[0]
    return Launch(kernel=last.kernel, arguments=last.arguments | {"PTX": True}, options=last.options)


def loop_of(ttgir: str) -> str:
    """The body of the kernel's loop over k."""
    return ttgir[ttgir.index("scf.for") : ttgir.index("scf.yield")]


def sass_of(compiled: Any, folder: Path) -> str:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_hopper(case: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = product(*case, 90, monkeypatch).compile(90)
    used = usage(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert "ttg.convert_layout" not in loop_of(compiled.asm["ttgir"])
    sass = sass_of(compiled, tmp_path)
    assert "HMMA.16816" in sass
    assert not re.search(r"\bHGMMA", sass)
    assert re.search(r"LDG\.E\S*\.128", sass)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], *MORE_ROWS], ids=str)
def test_on_ampere(case: tuple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = product(*case, 80, monkeypatch).compile(80)
    used = usage(compiled, tmp_path)
    spilled = under_3_6(160) if case[0] == 32 else 0
    assert used["STACK"] <= spilled and used["LOCAL"] == 0
    assert "HMMA.16816" in sass_of(compiled, tmp_path)


@pytest.mark.parametrize("capability", [100, 120])
@pytest.mark.parametrize("case", [(1, 4096, 4096, torch.bfloat16, False), (8, 28672, 8192, torch.bfloat16, False)], ids=str)
def test_on_blackwell(case: tuple, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few rows of x and a plain weight: no instruction multiplies bfloat16 by FP4, so registers hold the decoded weight."""
    compiled = product(*case, capability, monkeypatch).compile(capability)
    used = usage(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert "HMMA.16816" in sass_of(compiled, tmp_path)

"""Products with one 4-bit operand on Blackwell: no instruction multiplies bfloat16 by FP4, so registers hold decoded weights; no spills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)
from fp4compile.codegen.kernels import launch
from fp4compile.codegen.target import Target
from tests.codegen.kernels.cross_compiled import launches_of
from tests.codegen.kernels.sass import machine_code, multiplications

N, K = 2048, 1024


@pytest.mark.parametrize("m", [64, 4096])  # fewer: `test_decode_mm_compiled`
@pytest.mark.parametrize("capability", [100, 120])
def test_the_weight_is_decoded_without_spills(capability: int, m: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
    monkeypatch.setattr(launch, "known_target", lambda device, where: target)
    x, codes = torch.empty(m, K, dtype=torch.bfloat16), torch.empty(N, K // 2, dtype=torch.uint8)
    scales = torch.empty(N, K // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = (codes, scales, torch.ones(()))
    launches = launches_of(lambda: launch.scaled_mm(x, None, None, *weight, torch.zeros(N), K, torch.bfloat16), monkeypatch)
    multiplying = 0
    for each in launches:
        code = machine_code(each.compile(capability), tmp_path)
        assert code.stack == code.local == 0 and code.count("LDL") == 0, each.kernel.fn.__name__
        assert code.shared <= (232_448 if capability == 100 else 101_376)
        multiplying += multiplications(code.main_loop())
    assert multiplying

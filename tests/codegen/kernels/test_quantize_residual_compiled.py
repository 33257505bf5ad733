"""The kernels of `fp4::quantize_residual`, as launched for large matrices, compiled: no spills, the right instructions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernels.launch_residual import quantize_residual
from tests.codegen.kernels.cross_compiled import Launch, launches_of, under_3_6, usage
from tests.codegen.kernels.test_quantize_compiled import disassembled

# name: (rows, by block, layout, options)
CASES: dict[str, tuple[int, bool, str, dict[str, Any]]] = {
    "channels": (4096, False, "swizzled", {}),
    "blocks": (4096, True, "swizzled", {}),
    "row": (4096, False, "plain", {"global_scale": "row"}),
    "4/6": (4096, True, "plain", {"scale_rule": "four_over_six"}),
    "few": (8, False, "plain", {"scale_rule": "four_over_six"}),
    "mxfp4": (4096, False, "plain", {"format": "mxfp4"}),
}
SOME = {90: ("blocks", "row", "4/6", "mxfp4"), 100: ("channels",), 120: ("channels", "few")}

SPILLED = {(120, "few"): under_3_6(8)}


def launches(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    rows, by_block, layout, options = CASES[name]
    config = QuantConfig(**options)
    x, order = torch.empty(rows, 4096, dtype=torch.bfloat16), torch.arange(4096 // (config.fmt.block if by_block else 1)).int()
    found = launches_of(lambda: quantize_residual(x, -1, order, 256, config, layout), monkeypatch)
    known = [each.arguments | ({"CAPABILITY": capability} if "CAPABILITY" in each.arguments else {}) for each in found]
    return [replace(each, arguments=arguments) for each, arguments in zip(found, known, strict=True)]


@pytest.mark.parametrize(("capability", "name"), [(c, n) for c, names in SOME.items() for n in names])
def test_no_spills_and_the_right_instructions(capability: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizing, *before = launches(name, capability, monkeypatch)
    assert len(before) == (name in ("channels", "blocks", "4/6"))  # one launch for few rows, for scales of rows, and without a global scale
    compiled = quantizing.compile(capability)
    used = usage(compiled, tmp_path)
    assert used["STACK"] <= SPILLED.get((capability, name), 0) and used["LOCAL"] == 0, used
    assert quantizing.options["enable_fp_fusion"] is False
    sass = disassembled(compiled, tmp_path)
    assert ("F2FP.SATFINITE.E2M1" in sass) == (capability >= 100 and name in ("channels", "mxfp4"))
    assert ("F2FP.SATFINITE.E4M3" in sass) == (name != "mxfp4")
    if name in ("blocks", "4/6"):
        assert "LDG.E.128" in sass

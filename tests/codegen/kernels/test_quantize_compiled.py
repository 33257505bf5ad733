"""Quantize kernels, as they are launched for large matrices, compiled for each generation: no spills, the right instructions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.kernels import launch
from fp4compile.codegen.ops import quantize_args
from tests.codegen.kernels.cross_compiled import CUOBJDUMP, Launch, launches_of, under_3_6, usage

WGRAD = {"hadamard": 16, "rounding": "stochastic"}
FOUR_OVER_SIX = {"scale_rule": "four_over_six"}
EDEN = {"hadamard": 128, "rounding": "eden"}
STATIC = {"global_scale": "static", "static_amax": 4.0}
# name: (rows, columns, dtype, axis, or None for both, options, options of the column half, layout)
CASES: dict[str, tuple[int, int, torch.dtype, int | None, dict[str, Any], dict[str, Any], str]] = {
    "tensor": (4096, 4096, torch.bfloat16, -1, {}, {}, "swizzled"),
    "static": (4096, 4096, torch.float16, -1, STATIC, {}, "plain"),
    "row": (4096, 8192, torch.bfloat16, -1, {"global_scale": "row"} | FOUR_OVER_SIX, {}, "plain"),
    "long-row": (64, 65536, torch.bfloat16, -1, {"global_scale": "row"}, {}, "plain"),
    "few": (8, 4096, torch.bfloat16, -1, FOUR_OVER_SIX, {}, "swizzled"),
    "4/6": (4096, 4096, torch.bfloat16, -1, FOUR_OVER_SIX, {}, "plain"),
    "tile": (4096, 4096, torch.float32, -1, {"block": "16x16"} | FOUR_OVER_SIX, {}, "plain"),
    "across": (4096, 4096, torch.bfloat16, -2, {}, {}, "swizzled"),
    "wgrad": (4096, 4096, torch.bfloat16, -2, WGRAD, {}, "plain"),
    "h128": (4096, 4096, torch.bfloat16, -1, {"hadamard": 128}, {}, "plain"),
    "across-h64": (4096, 4096, torch.bfloat16, -2, {"hadamard": 64}, {}, "plain"),
    "across-h128": (4096, 4096, torch.float32, -2, {"hadamard": 128}, {}, "plain"),
    "eden": (4096, 4096, torch.bfloat16, -1, EDEN, {}, "plain"),
    "small-eden": (512, 512, torch.bfloat16, -1, EDEN, {}, "plain"),
    "across-eden": (4096, 4096, torch.bfloat16, -2, EDEN, {}, "plain"),
    "few-eden": (8, 4096, torch.bfloat16, -1, EDEN, {}, "swizzled"),
    "long-row-h128": (64, 32768, torch.bfloat16, -1, {"hadamard": 128, "global_scale": "row"}, {}, "plain"),
    "across-row-h64": (512, 512, torch.bfloat16, -2, {"hadamard": 64, "global_scale": "row"}, {}, "plain"),
    "mxfp4": (4096, 4096, torch.bfloat16, -1, {"format": "mxfp4"}, {}, "plain"),
    "ragged": (4095, 1037, torch.bfloat16, -1, {}, {}, "plain"),
    "both": (4096, 4096, torch.bfloat16, None, {}, {"hadamard": 16}, "swizzled"),
    "both-gradient": (4096, 4096, torch.bfloat16, None, {"rounding": "stochastic"}, WGRAD, "plain"),
}
SOME = {80: ("tensor", "4/6", "wgrad", "both", "across-eden"), 90: tuple(CASES), 103: ("tensor",)}
SOME |= {100: ("tensor", "tile", "wgrad", "mxfp4", "both", "eden"), 120: ("tensor", "4/6", "wgrad", "both", "across-eden")}
# A lane of EDEN holds a rotation of 128 elements; for sm_100 Triton 3.9 finds 16 registers too few.
SPILLED = {(100, "eden"): 64, (90, "ragged"): under_3_6(8)}
NEAREST_BY_HARDWARE = ("tensor", "mxfp4", "both")


def launches(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    rows, columns, dtype, axis, options, column, layout = CASES[name]
    x, seed = torch.empty(rows, columns, dtype=dtype), torch.tensor(1)
    args = quantize_args(QuantConfig(**options))
    if axis is None:
        both = launches_of(
            lambda: launch.quantize_both(x, args, quantize_args(QuantConfig(**column)), seed, seed, layout, layout), monkeypatch
        )
    else:
        both = launches_of(lambda: launch.quantize(x, axis, *args, seed, layout=layout), monkeypatch)
    # Under the CPU that records them, launchers ask for what the interpreter runs.
    known = [each.arguments | ({"CAPABILITY": capability} if "CAPABILITY" in each.arguments else {}) for each in both]
    return [replace(each, arguments=arguments) for each, arguments in zip(both, known, strict=True)]


@pytest.mark.parametrize(("capability", "name"), [(c, n) for c, names in SOME.items() for n in names])
def test_no_spills_and_the_right_instructions(capability: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizing, *before = launches(name, capability, monkeypatch)
    for each in (quantizing, *before):
        compiled = each.compile(capability)
        used = usage(compiled, tmp_path)
        assert used["STACK"] <= SPILLED.get((capability, name), 0) and used["LOCAL"] == 0, used
        assert not re.findall(r"\.ftz|\.approx|div\.full", compiled.asm["ptx"])
        assert each.options["enable_fp_fusion"] is False
    if capability == 103 and triton.__version__.startswith("3.6"):
        pytest.skip("the nvdisasm in Triton 3.6 does not know sm_103")
    sass = disassembled(quantizing.compile(capability), tmp_path)
    by_hardware = capability >= 100 and name in NEAREST_BY_HARDWARE
    assert ("F2FP.SATFINITE.E2M1" in sass) == by_hardware
    nvfp4_scales = capability >= 89 and name != "mxfp4"
    assert ("F2FP.SATFINITE.E4M3" in sass) == nvfp4_scales
    if name in ("tensor", "row", "4/6", "tile", "mxfp4", "both"):
        assert "LDG.E.128" in sass


@pytest.mark.parametrize(("name", "loads"), [("long-row-h128", 2 * 128 // 8), ("across-row-h64", 2 * 64)])
def test_large_units_are_read_at_two_places(name: str, loads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's time grows faster than the square of the loads: with a loop unrolled 15 times, minutes."""
    [here] = launches(name, 90, monkeypatch)
    assert here.compile(90).asm["ttir"].count("tt.load") == loads


def test_small_matrices_share_the_kernels_of_large_ones_where_compiling_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = launches("small-eden", 90, monkeypatch), launches("eden", 90, monkeypatch)
    assert [launch.kernel for launch in small] == [launch.kernel for launch in large] and len(small) == 2


def test_one_launch_for_few_rows_and_for_scales_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("row", "long-row", "few", "static", "mxfp4"):
        assert len(launches(name, 90, monkeypatch)) == 1, name
    for name in ("tensor", "both", "both-gradient"):
        assert len(launches(name, 90, monkeypatch)) == 2, name


def disassembled(compiled: Any, folder: Path) -> str:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    nvdisasm = CUOBJDUMP.with_name("nvdisasm")
    return subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout

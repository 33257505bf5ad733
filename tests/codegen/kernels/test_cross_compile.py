"""Every kernel, exactly as its launcher launches it, compiles for each generation of GPU on a machine without one, and spills nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.codegen.formats import FORMATS, QuantConfig
from fp4compile.codegen.kernels import launch
from fp4compile.codegen.ops import quantize_args
from tests.codegen.kernels.cross_compiled import launches_of, under_3_6, usage


def leaves_registers_in_flight(ptx: str) -> bool:
    """Whether a wgmma with its left operand in registers may still run when they are needed again: ptxas before 13.3 does not wait."""
    from_registers = re.search(r"wgmma\.mma_async\S* \{[^}]*\}, \{", ptx)
    return from_registers is not None and set(re.findall(r"wgmma\.wait_group\S* (\d+)", ptx)) != {"0"}


def quantize(dtype: torch.dtype, axis: int, **options: Any) -> Callable[[], object]:
    x = torch.zeros(4096, 1024, dtype=dtype)
    return lambda: launch.quantize(x, axis, *quantize_args(QuantConfig(**options)), torch.tensor(1))


def product(m: int, left: str, right: str, groups: int = 0) -> Callable[[], object]:
    k, n = 1024, 2048
    a, b = operand(left, m, k), operand(right, n, k)
    if not groups:
        return lambda: launch.scaled_mm(*a, *b, torch.zeros(n), k, torch.bfloat16)
    experts = [t if t is None else t.expand(groups, *t.shape) for t in b]
    return lambda: launch.scaled_grouped_mm(*a, *experts, torch.zeros(groups, dtype=torch.int32), k, torch.bfloat16)


def by_runs(m: int) -> Callable[[], object]:
    k, n = 1024, 2048
    a, b = ((*operand("nvfp4", rows, k)[:2], torch.ones(rows, k // 128)) for rows in (m, n))
    return lambda: launch.scaled_mm(*a, *b, torch.zeros(n), k, torch.bfloat16)


def operand(kind: str, rows: int, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if kind in ("bfloat16", "float16", "float32"):
        return torch.zeros(rows, k, dtype=getattr(torch, kind)), None, None
    scales = torch.zeros(rows, k // FORMATS[kind].block, dtype=torch.uint8).view(FORMATS[kind].scale_dtype)
    return torch.zeros(rows, k // 2, dtype=torch.uint8), scales, torch.ones(rows)


QUANTIZERS = {
    "plain": quantize(torch.bfloat16, -1),
    "tile": quantize(torch.bfloat16, -1, block="16x16", scale_rule="four_over_six"),
    "row": quantize(torch.float16, -1, global_scale="row", scale_rule="four_over_six_absmax"),
    "wgrad": quantize(torch.bfloat16, -2, hadamard=16, rounding="stochastic"),
    "h128": quantize(torch.float32, -2, hadamard=128),
    "mxfp4": quantize(torch.bfloat16, -1, format="mxfp4", rounding="stochastic"),
    "hadamard": lambda: launch.hadamard(torch.zeros(64, 4096), -1, 64),
}
PRODUCTS = {
    "w4a4-m1": product(1, "nvfp4", "nvfp4"),
    "w4a4-m64": product(64, "nvfp4", "nvfp4"),
    "w4a4-m4096": product(4096, "nvfp4", "nvfp4"),
    "mx-m4096": product(4096, "mxfp4", "mxfp4"),
    "bf16-m1": product(1, "bfloat16", "nvfp4"),
    "bf16-m4096": product(4096, "bfloat16", "nvfp4"),
    "fp16-m64": product(64, "float16", "nvfp4"),
    "fp16-mx": product(64, "float16", "mxfp4"),
    "fp32-m64": product(64, "float32", "nvfp4"),
    "a4-bf16-m1": product(1, "nvfp4", "bfloat16"),
    "a4-bf16-m4096": product(4096, "mxfp4", "bfloat16"),
    "a4-fp16-m64": product(64, "nvfp4", "float16"),
    "a4-mix-m4096": product(4096, "nvfp4", "mixfp4"),
    "bf16-mix-m1": product(1, "bfloat16", "mixfp4"),
    "bf16-mix-m4096": product(4096, "bfloat16", "mixfp4"),
    "bf16-if4-m64": product(64, "bfloat16", "if4"),
    "runs-m64": by_runs(64),
    "runs-m4096": by_runs(4096),
    "grouped-w4a4": product(2048, "nvfp4", "nvfp4", groups=8),
    "grouped-bf16": product(512, "bfloat16", "nvfp4", groups=8),
    "grouped-a4-bf16": product(2048, "nvfp4", "bfloat16", groups=8),
}
# The oldest supported GPU, the emulation's main target, and the two that fall back to it: fewer kernels there, for time.
CAPABILITIES = {
    90: (*QUANTIZERS, *PRODUCTS),
    80: ("tile", "wgrad", "h128", "w4a4-m4096", "bf16-m1", "fp32-m64", "a4-bf16-m4096", "bf16-mix-m4096", "runs-m4096", "grouped-w4a4"),
}
CAPABILITIES |= {100: ("tile", "wgrad", "w4a4-m4096", "grouped-bf16"), 120: ("tile", "wgrad", "w4a4-m4096", "mx-m4096", "grouped-bf16")}
SPILLED = {(80, "h128"): under_3_6(104), (90, "h128"): under_3_6(104), (120, "tile"): under_3_6(8)}
CASES = [(capability, name) for capability, names in CAPABILITIES.items() for name in names]


@pytest.mark.parametrize(("capability", "name"), CASES, ids=[f"sm_{c}-{n}" for c, n in CASES])
def test_compiles_without_spills(capability: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_ = launches_of((QUANTIZERS | PRODUCTS)[name], monkeypatch)[0]
    compiled = launch_.compile(capability)
    used = usage(compiled, tmp_path)
    assert used["STACK"] <= SPILLED.get((capability, name), 0) and used["LOCAL"] == 0, used
    ptx = compiled.asm["ptx"]
    if name in QUANTIZERS:
        # Each of these is another rounding than the reference's. FMAs are those that the source spells, whose products are exact.
        assert not re.findall(r"\.ftz|\.approx|div\.full", ptx)
        assert launch_.options["enable_fp_fusion"] is False
    elif not name.startswith("fp32"):
        assert re.search(r"\b(?:mma\.sync|wgmma|tcgen05\.mma)", ptx)
        assert not leaves_registers_in_flight(ptx)


def test_registers_left_in_flight_are_noticed() -> None:
    left = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, %rd1, 1, 1, 1, 0;"
    shared = left.replace("{%r5,%r6,%r7,%r8}", "%rd2")
    wait = "wgmma.wait_group.sync.aligned {};"
    assert leaves_registers_in_flight(left + wait.format(1) + wait.format(0))
    assert not leaves_registers_in_flight(left + wait.format(0))
    assert not leaves_registers_in_flight(shared + wait.format(1))


def test_the_amax_kernel_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plain", "h128", "wgrad"):
        amax = launches_of(QUANTIZERS[name], monkeypatch)[1]
        assert amax.kernel.fn.__name__ == "amax_kernel"
        used = usage(amax.compile(90), tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, used

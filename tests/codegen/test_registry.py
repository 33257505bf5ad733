"""Which family runs what on Ampere and Hopper, and the layouts they ask for."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.formats import Layout, QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.registry import kernel_for, layouts_for
from fp4compile.codegen.target import Target

NVFP4, MXFP4 = QuantConfig(), QuantConfig(format="mxfp4")
BF16, FP32 = torch.bfloat16, torch.float32
EMULATION = ("triton emulation", Layout.PLAIN)


@pytest.mark.parametrize(
    ("op", "lhs", "rhs", "dtype", "ampere", "hopper"),
    [
        ("scaled_mm", None, NVFP4, BF16, ("triton weight-only", Layout.TILED), ("triton weight-only", Layout.TILED)),
        ("scaled_mm", None, NVFP4, FP32, EMULATION, EMULATION),
        ("scaled_mm", NVFP4, NVFP4, BF16, EMULATION, ("triton hopper", Layout.TILED)),
        ("scaled_mm", MXFP4, NVFP4, FP32, EMULATION, ("triton hopper", Layout.TILED)),
        ("scaled_mm", NVFP4, None, BF16, EMULATION, EMULATION),
        ("scaled_mm", None, MXFP4, BF16, EMULATION, EMULATION),
        ("scaled_grouped_mm", None, NVFP4, BF16, EMULATION, ("triton hopper", Layout.TILED)),
        ("scaled_grouped_mm", NVFP4, NVFP4, BF16, EMULATION, ("triton hopper", Layout.TILED)),
        ("scaled_grouped_mm", MXFP4, MXFP4, BF16, EMULATION, EMULATION),
    ],
    ids=str,
)
def test_families_and_layouts_of_b(op, lhs, rhs, dtype, ampere, hopper) -> None:
    spec = KernelSpec(op=op, lhs=lhs, rhs=rhs, dtype=dtype)
    for capability, (name, layout) in ((80, ampere), (89, ampere), (90, hopper)):
        target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
        assert kernel_for(spec, target) == name
        assert layouts_for(spec, target) == (Layout.PLAIN, layout)

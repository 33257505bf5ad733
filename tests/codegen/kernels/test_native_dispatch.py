"""The operators launch native kernels where the target has FP4 tensor cores, and tell the graph so: registry and launches agree."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.formats import Layout, QuantConfig
from fp4compile.codegen.kernel_spec import KernelSpec
from fp4compile.codegen.kernels import launch, launch_native
from fp4compile.codegen.reference.layout import lay_out_ref
from fp4compile.codegen.registry import kernel_for, layouts_for
from fp4compile.codegen.target import Target
from tests.codegen.kernels.cross_compiled import launches_of

M, N, K = 256, 384, 512
NATIVE = {100: "triton tcgen05", 103: "triton tcgen05", 120: "triton mma.sync", 121: "triton mma.sync"}


def kernels_on(
    capability: int, left: str, right: str, patch: pytest.MonkeyPatch, *, layout: str = Layout.PLAIN, groups: int = 0
) -> list[str]:
    target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
    patch.setattr(launch, "known_target", lambda device, where: target)
    patch.setattr(launch, "processors_of", lambda device: 148)
    a, b = operand(left, M, layout), operand(right, N, layout)
    named = {"a_layout": layout, "b_layout": layout}
    if groups:
        experts = [None if t is None else t.expand(groups, *t.shape) for t in b]
        offs = torch.zeros(groups, dtype=torch.int32)
        return [found.kernel.fn.__name__ for found in launches_of(
            lambda: launch.scaled_grouped_mm(*a, *experts, offs, K, torch.bfloat16, **named), patch)]  # fmt: skip
    return [found.kernel.fn.__name__ for found in launches_of(
        lambda: launch.scaled_mm(*a, *b, torch.zeros(N), K, torch.bfloat16, **named), patch)]  # fmt: skip


def operand(kind: str, rows: int, layout: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if kind == "bf16":
        return torch.zeros(rows, K, dtype=torch.bfloat16), None, None
    block, dtype = (16, torch.float8_e4m3fn) if kind == "nvfp4" else (32, torch.float8_e8m0fnu)
    codes, scales = torch.zeros(rows, K // 2, dtype=torch.uint8), torch.zeros(rows, K // block, dtype=torch.uint8).view(dtype)
    return *lay_out_ref(codes, scales, layout), torch.ones(())


@pytest.mark.parametrize("layout", [Layout.PLAIN, Layout.SWIZZLED])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("capability", NATIVE)
def test_w4a4_is_native(capability: int, fmt: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantConfig(format=fmt)
    target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
    for op, groups, kernel in (("scaled_mm", 0, "native_mm_kernel"), ("scaled_grouped_mm", 4, "native_grouped_mm_kernel")):
        spec = KernelSpec(op=op, lhs=config, rhs=config, dtype=torch.bfloat16)
        assert kernel_for(spec, target) == NATIVE[capability]
        assert layouts_for(spec, target) == (Layout.SWIZZLED, Layout.SWIZZLED)
        assert kernel in kernels_on(capability, fmt, fmt, monkeypatch, layout=layout, groups=groups)


@pytest.mark.parametrize("shape", [(4096,), (1, 4096), ()], ids=str)
def test_a_bias_of_one_row_of_x_keeps_k_split(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives the dimension of one row a stride; taken for a bias of each element, it would forbid the split."""
    a, b = operand("nvfp4", 1, Layout.PLAIN), operand("nvfp4", 4096, Layout.PLAIN)
    found = launches_of(
        lambda: launch_native.scaled_mm(*a, *b, torch.zeros(shape), K, torch.bfloat16, capability=100, chosen=None), monkeypatch
    )
    assert found[-1].arguments["BIAS"] == "row"
    deep = a[0].new_zeros(1, 4096), a[1].view(torch.uint8).new_zeros(1, 512).view(torch.float8_e4m3fn), None
    wide = torch.zeros(4096, 4096, dtype=torch.uint8), torch.zeros(4096, 512, dtype=torch.uint8).view(torch.float8_e4m3fn), None
    found = launches_of(
        lambda: launch_native.scaled_mm(*deep, *wide, torch.zeros(shape), 8192, torch.bfloat16, capability=100), monkeypatch
    )
    assert [each.kernel.fn.__name__ for each in found] == ["sum_splits_kernel", "native_mm_kernel"]


def test_what_is_not_native_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(100, "nvfp4", "mxfp4"), (100, "bf16", "nvfp4"), (120, "nvfp4", "bf16"), (90, "nvfp4", "nvfp4")]
    for capability, left, right in cases:
        target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
        lhs, rhs = (None if kind == "bf16" else QuantConfig(format=kind) for kind in (left, right))
        spec = KernelSpec(op="scaled_mm", lhs=lhs, rhs=rhs, dtype=torch.bfloat16)
        assert kernel_for(spec, target) not in NATIVE.values()
        assert not {"native_mm_kernel", "native_grouped_mm_kernel"} & set(kernels_on(capability, left, right, monkeypatch))

"""Every kernel that a product on sm_80 to sm_90 launches besides the decode and Hopper ones, compiled: no spills, no register in flight."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from fp4compile.codegen.kernels import launch
from fp4compile.codegen.kernels.hopper_tiles import TILES
from fp4compile.codegen.kernels.launch_dequantize import tile_on_device
from fp4compile.codegen.kernels.launch_hopper import multiply_groups_hopper, multiply_hopper
from fp4compile.codegen.target import Target
from tests.codegen.kernels.cross_compiled import launches_of, usage
from tests.codegen.kernels.exact_products import exact_side
from tests.codegen.kernels.test_cross_compile import leaves_registers_in_flight

SMALL = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes of shared memory a block may have


@pytest.mark.parametrize("capability", SMALL)
@pytest.mark.parametrize(
    ("left", "right"), [("bf16", "mxfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "bf16"), ("fp16", "nvfp4")], ids=lambda kind: kind
)
def test_operands_are_dequantized_and_multiplied(
    left: str, right: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
    monkeypatch.setattr(launch, "known_target", lambda device, where: target)
    generator = torch.Generator().manual_seed(0)
    a, b = (exact_side(kind, (1, 512, 512), generator, global_scale="row") for kind in (left, right))
    recorded = launches_of(lambda: launch.scaled_mm(*a.arguments(), *b.arguments(), None, 512, torch.bfloat16), monkeypatch)
    names = [each.kernel.fn.__name__ for each in recorded]
    decoders = {"nvfp4": ["dequantize_plain_kernel"], "mxfp4": ["dequantize_kernel"]}
    product = "half_hopper_mm_kernel" if capability == 90 else "half_mm_kernel"
    assert names == [product, *decoders.get(right, []), *decoders.get(left, [])]
    for each in recorded:
        compiled = each.compile(capability)
        used = usage(compiled, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, (each.kernel, used)
        assert compiled.metadata.shared <= SMALL[capability]
        assert not leaves_registers_in_flight(compiled.asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90])
def test_helpers(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codes = torch.zeros(4, 32, 2, 1024, dtype=torch.uint8)
    scales = torch.zeros(4, 32, 2, 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x, out = torch.zeros(64, 256, dtype=torch.bfloat16), torch.zeros(64, 512, dtype=torch.bfloat16)
    offs = torch.zeros(4, dtype=torch.int32)
    split = type(TILES[0])(**{**vars(TILES[0]), "splits": 2})
    plain = torch.zeros(3, 40, 88, dtype=torch.uint8), torch.zeros(3, 40, 11, dtype=torch.uint8).view(torch.float8_e4m3fn)
    calls = (
        lambda: multiply_hopper(x, codes[0], scales[0], None, torch.ones(()), None, out, split),
        lambda: multiply_groups_hopper(x, codes, scales, None, None, offs, out, TILES[0]),
        lambda: tile_on_device(*plain),
    )
    recorded = {each.kernel.fn.__name__: each for call in calls for each in launches_of(call, monkeypatch)}
    for name in ("sum_splits_kernel", "group_tiles_kernel", "tile_weight_kernel"):
        used = usage(recorded[name].compile(capability), tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0, (name, used)

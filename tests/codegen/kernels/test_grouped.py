"""The grouped product against its reference, bit for bit, for every way of splitting rows among experts."""

from __future__ import annotations

import pytest
import torch

from fp4compile.codegen.kernels import launch
from fp4compile.codegen.reference.grouped import scaled_grouped_mm_ref
from tests.codegen.kernels.exact_products import Side, exact_side
from tests.codegen.kernels.hard_inputs import first_differences

SPLITS = {
    "even": [8, 16, 24, 32],
    "one_takes_all": [0, 32, 32, 32],
    "empty_ends": [0, 20, 32, 32],
    "rows_left_over": [3, 3, 17, 21],
    "no_rows": [0, 0, 0, 0],
    "past_a_tile": [17, 18, 18, 32],
}


def assert_exact(a: Side, b: Side, offs: torch.Tensor, k: int, out_dtype: torch.dtype = torch.float32) -> None:
    got = launch.scaled_grouped_mm(*a.arguments(), *b.arguments(), offs, k, out_dtype)
    want = scaled_grouped_mm_ref(*a.arguments(), *b.arguments(), offs, k, out_dtype)
    assert got.is_contiguous()
    # The reference writes +0 past the last offset; so does the kernel.
    assert not first_differences(got, want), first_differences(got, want)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("left", "right"), [("nvfp4", "nvfp4"), ("bf16", "nvfp4"), ("nvfp4", "fp16"), ("mxfp4", "mxfp4"), ("fp32", "nvfp4")]
)
def test_every_split(device: torch.device, split: str, left: str, right: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    a = exact_side(left, (32, 40), generator, global_scale="row")
    b = exact_side(right, (4, 20, 40), generator, global_scale="tensor")
    assert_exact(a, b, torch.tensor(SPLITS[split], dtype=torch.int32, device=device), 40)


@pytest.mark.parametrize("granularity", [("none", "none"), ("tensor", "row"), ("row", "none"), ("tensor", "tensor")], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_global_scales(device: torch.device, granularity: tuple[str, str], out_dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(1)
    a = exact_side("nvfp4", (19, 32), generator, global_scale=granularity[0])
    b = exact_side("nvfp4", (3, 70, 32), generator, global_scale=granularity[1])
    assert_exact(a, b, torch.tensor([5, 5, 18], dtype=torch.int64, device=device), 32, out_dtype)


@pytest.mark.parametrize("experts", [1, 2, 5, 16])
def test_numbers_of_experts(device: torch.device, experts: int) -> None:
    generator = torch.Generator(device).manual_seed(experts)
    total = 5 * experts
    offs = torch.randint(0, total + 1, (experts,), generator=generator, device=device, dtype=torch.int32).sort().values
    a = exact_side("bf16", (total, 16), generator)
    b = exact_side("nvfp4", (experts, 6, 16), generator, global_scale="tensor")
    assert_exact(a, b, offs, 16)
    assert_exact(a, b, torch.stack([offs, offs], dim=1)[:, 0], 16)  # offsets need not be contiguous


def test_tiles_of_many_rows(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(5)
    offs = torch.tensor([18, 40], dtype=torch.int32, device=device)
    for left, right in (("nvfp4", "bf16"), ("bf16", "nvfp4")):
        a, b = exact_side(left, (45, 40), generator, global_scale="row"), exact_side(right, (2, 20, 40), generator, global_scale="row")
        assert_exact(a, b, offs, 40)


def test_results_without_elements(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(3)
    a, b = exact_side("bf16", (0, 16), generator), exact_side("nvfp4", (2, 6, 16), generator)
    assert_exact(a, b, torch.zeros(2, dtype=torch.int32, device=device), 16)


def test_without_experts_every_row_is_zero(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(4)
    a, b = exact_side("bf16", (4, 16), generator), exact_side("nvfp4", (0, 6, 16), generator)
    assert_exact(a, b, torch.zeros(0, dtype=torch.int32, device=device), 16)

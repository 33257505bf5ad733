"""Each product is given the name of its kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.codegen.target import Target
from fp4compile.passes.fold_weights import FoldWeights
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.select_kernels import SelectKernels
from tests.passes.harness import W4A16, TwoLayers, apply, check_golden, decide_forward
from tests.passes.linear_ref import BF16, SETUP, linear_ref

HOPPER = Target(name="sm_90", device_type="cuda", capability=90)
BLACKWELL = Target(name="sm_100", device_type="cuda", capability=100)
FOLDED = [*SETUP, InsertQuantize(), FoldWeights()]


def test_select_kernels_names_the_family(accept: bool) -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[SelectKernels()])
    check_golden("select_kernels/w4a4", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0] and got.same_code


def test_select_kernels_ignores_plain_matmuls() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[SelectKernels()])
    assert got.changed == [0]


def test_a_weight_of_whole_tiles_is_laid_out_for_the_weight_only_kernel(accept: bool) -> None:
    """Of the weights 32 x 128 and 20 x 32 the second has no whole tiles. The values stay what they were."""
    model, x = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 20)).bfloat16(), torch.randn(5, 128, dtype=BF16)
    got = apply(model, x, setup=FOLDED, passes=[SelectKernels()], decide=decide_forward(W4A16), target=HOPPER)
    check_golden("select_kernels/w4a16_hopper", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0]
    assert got.after.count("layout='tiled'") == 2  # the quantize node and the b_layout of its reader
    hidden = linear_ref(x, model[0], None).relu()
    torch.testing.assert_close(got.output, linear_ref(hidden, model[2], None))


def test_a_weight_that_is_quantized_anew_by_each_call_stays_plain() -> None:
    got = apply(
        TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[SelectKernels()],
        decide=decide_forward(W4A16), target=HOPPER,
    )  # fmt: skip
    assert got.changed == [2] and "layout=" not in got.after


def test_emulated_products_of_two_quantized_operands_stay_plain() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=FOLDED, passes=[SelectKernels()], target=HOPPER)
    assert got.changed == [2] and "layout=" not in got.after


@pytest.mark.parametrize(("rows", "laid_out"), [(5, 1), (100, 2)])
def test_scales_of_native_products_are_swizzled_but_for_a_few_rows(rows: int, laid_out: int, accept: bool) -> None:
    """The weight's are, in the weight store; those of x where it has more rows than the tiles for few."""
    model, x = nn.Sequential(nn.Linear(128, 32)).bfloat16(), torch.randn(rows, 128, dtype=BF16)
    got = apply(model, x, setup=FOLDED, passes=[SelectKernels()], target=BLACKWELL)
    check_golden(f"select_kernels/w4a4_blackwell_{rows}", got.before, got.after, accept)
    assert got.changed == [1] and got.changed_again == [0]
    assert got.after.count("layout='swizzled'") == 2 * laid_out  # each a quantize node and its reader
    before = apply(model, x, setup=FOLDED, passes=[], target=BLACKWELL)
    torch.testing.assert_close(got.output, before.output, rtol=0, atol=0)

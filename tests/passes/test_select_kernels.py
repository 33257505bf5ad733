"""Each product is given the name of its kernel."""

from __future__ import annotations

import torch

from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.select_kernels import SelectKernels
from tests.passes.harness import TwoLayers, apply, check_golden
from tests.passes.linear_ref import BF16, SETUP


def test_select_kernels_names_the_family(accept: bool) -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[SelectKernels()])
    check_golden("select_kernels/w4a4", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0] and got.same_code


def test_select_kernels_ignores_plain_matmuls() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[SelectKernels()])
    assert got.changed == [0]

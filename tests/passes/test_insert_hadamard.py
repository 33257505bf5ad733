"""Both operands are rotated along the contraction dimension."""

from __future__ import annotations

import torch

from fp4compile.codegen import ops
from fp4compile.passes.insert_hadamard import InsertHadamard
from fp4compile.passes.site import OperandKind
from tests.passes.harness import TwoLayers, apply, check_golden, decide_forward
from tests.passes.linear_ref import BF16, ROTATED, SETUP


def test_insert_hadamard_rotates_both_operands(accept: bool) -> None:
    configs = {OperandKind.WEIGHT: ROTATED, OperandKind.ACTIVATION: ROTATED}
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[InsertHadamard()], decide=decide_forward(configs))
    check_golden("insert_hadamard/w4a4", got.before, got.after, accept)
    assert got.changed == [4] and got.count(ops.HADAMARD) == 4


def test_insert_hadamard_has_nothing_to_do_without_a_plan_for_it() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[InsertHadamard()])
    assert got.changed == [0] and got.same_code

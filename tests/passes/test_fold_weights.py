"""Weights that parameters alone decide are constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fp4compile.passes.fold_weights import FoldWeights
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.site import OperandKind
from tests.passes.harness import TwoLayers, apply, check_golden, decide_forward
from tests.passes.linear_ref import BF16, PLAIN, SETUP


def test_fold_weights_marks_what_parameters_alone_decide(accept: bool) -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[FoldWeights()])
    check_golden("fold_weights/w4a4", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0]


def test_fold_weights_refuses_a_weight_that_an_input_changes() -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 32))

        def forward(self, x, gain):
            return F.linear(x, self.w * gain)

    configs = {OperandKind.ACTIVATION: PLAIN}
    got = apply(
        Modulated(), torch.randn(5, 32), torch.randn(16, 1), setup=[*SETUP, InsertQuantize()], passes=[FoldWeights()],
        decide=lambda sites: decide_forward(configs)(sites),
    )  # fmt: skip
    assert got.changed == [0]

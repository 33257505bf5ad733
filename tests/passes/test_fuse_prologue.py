"""Rotations move into the quantizer that reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fp4compile.codegen import ops
from fp4compile.passes.fuse_prologue import FusePrologue
from fp4compile.passes.insert_hadamard import InsertHadamard
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.site import OperandKind
from tests.passes.harness import TwoLayers, apply, check_golden, decide_forward
from tests.passes.linear_ref import BF16, ROTATED, SETUP, linear_ref_rotated


def test_fuse_prologue(accept: bool) -> None:
    configs = {OperandKind.WEIGHT: ROTATED, OperandKind.ACTIVATION: ROTATED}
    model, x = TwoLayers(), torch.randn(5, 32, dtype=BF16)
    setup = [*SETUP, InsertHadamard(), InsertQuantize()]
    fused = apply(model, x, setup=setup, passes=[FusePrologue()], decide=decide_forward(configs))
    check_golden("fuse_prologue/w4a4", fused.before, fused.after, accept)
    assert fused.changed == [4] and fused.changed_again == [0] and fused.count(ops.HADAMARD) == 0
    expected = linear_ref_rotated(F.relu(linear_ref_rotated(x, model.up)), model.down)
    torch.testing.assert_close(fused.output, expected, rtol=2**-8, atol=1e-5)


def test_fuse_prologue_keeps_a_rotation_that_somebody_else_reads() -> None:
    def rotated(x):
        return torch.ops.fp4.hadamard(x, -1, 16)

    got = apply(rotated, torch.randn(5, 32), passes=[FusePrologue()])
    assert got.changed == [0] and got.count(ops.HADAMARD) == 1

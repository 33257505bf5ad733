"""Hadamard, quantize, share, fuse, fold, select, cleanup: golden text, values against an independent evaluation, idempotence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.passes.harness import W4A4, W4A16, SharedInput, TwoLayers, apply, check_golden, decide_forward, decide_training
from torch import nn

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.passes.assign_precision import AssignPrecision
from fp4compile.passes.cleanup import Cleanup
from fp4compile.passes.find_matmuls import FindMatmuls
from fp4compile.passes.fold_weights import FoldWeights
from fp4compile.passes.fuse_prologue import FusePrologue
from fp4compile.passes.insert_hadamard import InsertHadamard
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.normalize import Normalize
from fp4compile.passes.pipeline import PIPELINE
from fp4compile.passes.select_kernels import SelectKernels
from fp4compile.passes.share_quantize import ShareQuantize
from fp4compile.passes.site import OperandKind

BF16 = torch.bfloat16
SETUP = [Normalize(), FindMatmuls(), AssignPrecision()]
ROTATED = QuantConfig(hadamard=16)


def fake(x: torch.Tensor, config: QuantConfig = QuantConfig()) -> torch.Tensor:
    """float32 values that `x` takes when quantized along its last dimension; a linear sees one matrix, whatever the batch."""
    return dequantize_ref(*quantize_ref(x.flatten(0, -2), config))[:, : x.shape[-1]].view(x.shape)


def linear_ref(x: torch.Tensor, layer: nn.Linear, config: QuantConfig | None) -> torch.Tensor:
    """One rounding at the end, as the operator has it."""
    left = x.float() if config is None else fake(x, config)
    out = left @ fake(layer.weight, config or QuantConfig()).T
    return (out if layer.bias is None else out + layer.bias.float()).to(x.dtype)


@pytest.mark.parametrize(("configs", "activation"), [(W4A4, QuantConfig()), (W4A16, None)], ids=["w4a4", "w4a16"])
def test_insert_quantize(configs, activation, accept: bool) -> None:
    model, x = TwoLayers(), torch.randn(2, 5, 32, dtype=BF16)
    got = apply(model, x, setup=SETUP, passes=[InsertQuantize()], decide=decide_forward(configs))
    check_golden(f"insert_quantize/{'w4a4' if activation else 'w4a16'}", got.before, got.after, accept)
    expected = linear_ref(F.relu(linear_ref(x, model.up, activation)), model.down, activation)
    torch.testing.assert_close(got.output, expected, rtol=2**-8, atol=1e-5)  # one bf16 rounding apart where fp32 sums differ
    assert got.changed == [2] and got.changed_again == [0] and got.count(ops.SCALED_MM) == 2


def test_a_matmul_that_directly_reads_another_reads_its_rewritten_form() -> None:
    model = nn.Sequential(nn.Linear(32, 40, dtype=BF16), nn.Linear(40, 32, dtype=BF16))
    x = torch.randn(5, 32, dtype=BF16)
    got = apply(model, x, setup=SETUP, passes=[InsertQuantize()])
    expected = linear_ref(linear_ref(x, model[0], QuantConfig()), model[1], QuantConfig())
    torch.testing.assert_close(got.output, expected, rtol=2**-7, atol=1e-5)


def test_insert_quantize_leaves_unplanned_sites_alone() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[InsertQuantize()], decide=decide_forward({}))
    assert got.changed == [0] and got.same_code


def test_insert_hadamard_rotates_both_operands_and_fusing_undoes_the_node(accept: bool) -> None:
    configs = {OperandKind.WEIGHT: ROTATED, OperandKind.ACTIVATION: ROTATED}
    model, x = TwoLayers(), torch.randn(5, 32, dtype=BF16)
    got = apply(model, x, setup=SETUP, passes=[InsertHadamard()], decide=decide_forward(configs))
    check_golden("insert_hadamard/w4a4", got.before, got.after, accept)
    assert got.changed == [4] and got.count(ops.HADAMARD) == 4

    setup = [*SETUP, InsertHadamard(), InsertQuantize()]
    fused = apply(model, x, setup=setup, passes=[FusePrologue()], decide=decide_forward(configs))
    check_golden("fuse_prologue/w4a4", fused.before, fused.after, accept)
    assert fused.changed == [4] and fused.changed_again == [0] and fused.count(ops.HADAMARD) == 0
    expected = linear_ref_rotated(F.relu(linear_ref_rotated(x, model.up)), model.down)
    torch.testing.assert_close(fused.output, expected, rtol=2**-8, atol=1e-5)


def linear_ref_rotated(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """K = 40 is padded to 48 before it is rotated, on both sides."""
    out = dequantize_ref(*quantize_ref(x, ROTATED)) @ dequantize_ref(*quantize_ref(layer.weight, ROTATED)).T
    return (out if layer.bias is None else out + layer.bias.float()).to(x.dtype)


def test_insert_hadamard_has_nothing_to_do_without_a_plan_for_it() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[InsertHadamard()])
    assert got.changed == [0] and got.same_code


def test_fuse_prologue_keeps_a_rotation_that_somebody_else_reads() -> None:
    def rotated(x):
        return torch.ops.fp4.hadamard(x, -1, 16)

    got = apply(rotated, torch.randn(5, 32), passes=[FusePrologue()])
    assert got.changed == [0] and got.count(ops.HADAMARD) == 1


def test_share_quantize(accept: bool) -> None:
    model, x = SharedInput(), torch.randn(2, 3, 32, dtype=BF16)
    got = apply(model, x, setup=[*SETUP, InsertQuantize()], passes=[ShareQuantize()])
    check_golden("share_quantize/qkv", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0] and got.count(ops.QUANTIZE) == 4
    for out, layer in zip(got.output, (model.q, model.k, model.v), strict=True):
        torch.testing.assert_close(out, linear_ref(x, layer, QuantConfig()), rtol=2**-8, atol=1e-5)


def test_share_quantize_never_merges_stochastic_draws() -> None:
    x = torch.randn(6, 32, dtype=BF16, requires_grad=True)
    got = apply(SharedInput(), x, setup=[*SETUP, InsertHadamard(), InsertQuantize()], passes=[ShareQuantize()], decide=decide_training, training=True)
    stochastic = 3 * 2  # dY of each layer, once for dgrad and once for wgrad
    assert got.after.count("'stochastic'") == stochastic


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

    configs = {OperandKind.ACTIVATION: QuantConfig()}
    got = apply(
        Modulated(), torch.randn(5, 32), torch.randn(16, 1), setup=[*SETUP, InsertQuantize()], passes=[FoldWeights()],
        decide=lambda sites: decide_forward(configs)(sites),
    )  # fmt: skip
    assert got.changed == [0]


def test_select_kernels_names_the_family() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[SelectKernels()])
    assert got.changed == [2] and got.changed_again == [0] and got.same_code


def test_select_kernels_ignores_plain_matmuls() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[SelectKernels()])
    assert got.changed == [0]


def test_cleanup(accept: bool) -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[Cleanup()])
    check_golden("cleanup/w4a4", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0]  # the permutes of both weights


def test_cleanup_keeps_what_is_read() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), passes=[Cleanup()])
    assert got.changed == [0] and got.same_code


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_whole_pipeline_is_idempotent(training: bool, dynamic: bool) -> None:
    x = torch.randn(6, 32, dtype=BF16, requires_grad=training)
    decide = decide_training if training else decide_forward(W4A4)
    got = apply(TwoLayers(), x, setup=PIPELINE, passes=[p for p in PIPELINE if p.name not in ("find-matmuls", "assign-precision")], decide=decide,
                training=training, dynamic=dynamic)  # fmt: skip
    assert sum(got.changed) == 0

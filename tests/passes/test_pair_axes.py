"""A value that is read along both axes is quantized by one node, bit for bit as by two."""

from __future__ import annotations

import torch
from torch import nn

from fp4compile.codegen import ops
from fp4compile.passes.fold_weights import FoldWeights
from fp4compile.passes.fuse_prologue import FusePrologue
from fp4compile.passes.insert_hadamard import InsertHadamard
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.pair_axes import PairAxes
from fp4compile.passes.share_quantize import ShareQuantize
from tests.passes.harness import SharedInput, TwoLayers, apply, check_golden, decide_training
from tests.passes.linear_ref import BF16, SETUP

PAIR = (PairAxes(),)
BEFORE = [*SETUP, InsertHadamard(), InsertQuantize(), ShareQuantize(), FusePrologue(), FoldWeights()]


def paired(model: nn.Module, x: torch.Tensor, passes=PAIR):
    return apply(model, x, setup=BEFORE, passes=passes, decide=decide_training, training=True)


def test_activations_and_gradients_are_paired_and_weights_are_not(accept: bool) -> None:
    model, x = TwoLayers(), torch.randn(6, 32, dtype=BF16, requires_grad=True)
    got = paired(model, x)
    check_golden("pair_axes/training", got.before, got.after, accept)
    assert got.changed == [4] and got.changed_again == [0]  # x and dy of two layers
    assert got.count(ops.QUANTIZE_BOTH) == 4 and got.count(ops.QUANTIZE) == 4  # W and its transpose of two layers


def test_values_are_those_of_two_nodes() -> None:
    model, gradients = TwoLayers(torch.float32), []
    for passes in ([], [PairAxes()]):
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.zero_grad()
        torch.manual_seed(1)
        paired(model, x, passes).output.square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_one_reading_serves_all_layers_of_one_input() -> None:
    got = paired(SharedInput(), torch.randn(6, 32, dtype=BF16, requires_grad=True))
    assert got.changed == [4] and got.count(ops.QUANTIZE_BOTH) == 4  # x once, dy of q, k and v


def test_inference_has_nothing_to_pair() -> None:
    got = apply(TwoLayers(), torch.randn(6, 32, dtype=BF16), setup=BEFORE, passes=[PairAxes()])
    assert got.changed == [0] and got.same_code

"""1x1 convolutions and patch embeddings as matmuls; everything else refused with what it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.passes.assign_precision import AssignPrecision
from fp4compile.passes.find_matmuls import FindMatmuls
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.lower_convolutions import LowerConvolutions
from fp4compile.passes.normalize import Normalize
from fp4compile.passes.pipeline import PIPELINE
from tests.passes.harness import apply, check_golden

SETUP = [Normalize(), FindMatmuls(), AssignPrecision()]


def test_golden_patch_embedding(accept: bool) -> None:
    got = apply(nn.Conv2d(3, 8, 4, 4), torch.randn(2, 3, 8, 12), setup=SETUP, passes=[LowerConvolutions()])
    check_golden("lower_convolutions/patch_embedding", got.before, got.after, accept)
    assert got.changed == [1] and got.changed_again == [0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic-batch"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 8, 4, 4), (2, 3, 8, 12)),
        (nn.Conv2d(24, 8, 1, bias=False), (2, 24, 5, 7)),
        (nn.Conv1d(6, 8, 4, 4), (2, 6, 12)),
        (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (2, 3, 4, 8, 4)),
    ],
    ids=["patch", "1x1", "1d", "3d"],
)
def test_value_is_that_of_the_convolution_of_quantized_operands(layer, shape, dynamic) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    x = torch.randn(shape)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    got = apply(Model(), x, setup=SETUP, passes=[LowerConvolutions(), InsertQuantize()])
    assert got.count(ops.SCALED_MM) == 1
    patches = nn.functional.unfold(x, layer.kernel_size, stride=layer.stride) if x.ndim == 4 else None
    if patches is not None:
        rows = patches.mT.reshape(-1, patches.shape[1])
        weight = layer.weight.flatten(1)
        want = fake(rows) @ fake(weight).T + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(got.output.permute(0, 2, 3, 1).reshape(want.shape), want, rtol=1e-4, atol=1e-5)
    relative = (got.output - layer(x)).norm() / layer(x).norm()
    assert got.output.shape == layer(x).shape and 0.02 < relative < 0.25


def fake(x: torch.Tensor) -> torch.Tensor:
    return dequantize_ref(*quantize_ref(x, QuantConfig()))[:, : x.shape[1]]


def test_training_keeps_the_backward_of_the_convolution() -> None:
    layer = nn.Conv2d(3, 8, 4, 4)
    got = apply(layer, torch.randn(2, 3, 8, 8), setup=PIPELINE[:3], passes=PIPELINE[3:], training=True)
    assert got.count(ops.SCALED_MM) == 1 and got.count(torch.ops.aten.convolution_backward.default) == 1


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(4, 8, 3), (1, 4, 9, 9), "3x3 convolution overlap"),
        (nn.Conv2d(4, 8, 2, 2, padding=1), (1, 4, 8, 8), "overlap or are padded"),
        (nn.Conv2d(4, 8, 1, groups=2), (1, 4, 8, 8), "in 2 groups"),
        (nn.ConvTranspose2d(4, 8, 2, 2), (1, 4, 8, 8), "transposed"),
        (nn.Conv2d(4, 8, 4, 4), (1, 4, 9, 9), "does not tile the input"),
    ],
)
def test_refusals(layer, shape, reason) -> None:
    got = apply(layer, torch.randn(shape), setup=SETUP, passes=[LowerConvolutions()])
    assert got.changed == [0] and reason in got.sites[0].refusal and got.record.sites[0].fallback

"""Products with calibrated outliers get wider, and compute (Q(x) + Q(x - Q(x))) Q(W)^T on those."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.outliers import Outliers
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.codegen.reference.residual import in_order_ref
from fp4compile.codegen.residual_ops import QUANTIZE_REPEATED, QUANTIZE_RESIDUAL
from fp4compile.codegen.target import Target
from fp4compile.passes.add_residuals import AddResiduals
from fp4compile.passes.assign_precision import AssignPrecision
from fp4compile.passes.fold_weights import FoldWeights
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.pipeline import PIPELINE
from fp4compile.passes.share_quantize import ShareQuantize
from fp4compile.passes.site import Site
from tests.passes.harness import DECIDE_W4A4, Decide, SharedInput, TwoLayers, apply, check_golden
from tests.passes.linear_ref import BF16, SETUP

PLAIN = QuantConfig()


def some_outliers(k: int, *, block: int = 1, count: int = 16) -> Outliers:
    order = torch.randperm(-(-k // 16) * 16 // block, generator=torch.Generator().manual_seed(k)).int()
    return Outliers(order=order, count=count, wanted=count)


def with_outliers(block: int = 1, count: int = 16) -> Decide:
    def decide(sites: list[Site]) -> list:
        return [
            replace(d, outliers=some_outliers(int(s.k), block=block, count=count)) for d, s in zip(DECIDE_W4A4(sites), sites, strict=True)
        ]

    return decide


def eager(x: Tensor, layer: nn.Linear, outliers: Outliers) -> Tensor:
    """In float64 of decoded values, residuals beside and not behind their blocks."""
    x, weight = (in_order_ref(t.float(), outliers.order, PLAIN) for t in (x, layer.weight))
    codes, scales, decode = quantize_ref(x.flatten(0, -2), PLAIN)
    once = dequantize_ref(codes, scales, decode)
    lost = (x.flatten(0, -2) - once)[:, -outliers.count :]
    amax = QuantConfig(global_scale="static", static_amax=x.abs().max().item())  # type: ignore[arg-type]
    twice = once.double()
    twice[:, -outliers.count :] += dequantize_ref(*quantize_ref(lost, amax)).double()
    out = twice @ dequantize_ref(*quantize_ref(weight, PLAIN)).double().T
    return (out + (0 if layer.bias is None else layer.bias.double())).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("block", [1, 16], ids=["channels", "blocks"])
def test_add_residuals(block: int, accept: bool) -> None:
    model, x = TwoLayers(), torch.randn(2, 5, 32, dtype=BF16)
    got = apply(model, x, setup=[*SETUP, InsertQuantize()], passes=[AddResiduals()], decide=with_outliers(block))
    if block == 1:
        check_golden("add_residuals/channels", got.before, got.after, accept)
    hidden = torch.relu(eager(x, model.up, some_outliers(32, block=block)).to(BF16))
    expected = eager(hidden, model.down, some_outliers(40, block=block))
    torch.testing.assert_close(got.output.double(), expected, rtol=2**-7, atol=2**-7)  # two bf16 roundings
    assert got.changed == [2] and got.changed_again == [0]
    assert got.count(QUANTIZE_RESIDUAL) == got.count(QUANTIZE_REPEATED) == 2 and got.count(ops.QUANTIZE) == 0
    assert ", k=64," in got.after  # 40 in whole blocks, and 16 outliers


def test_products_without_outliers_stay() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[AddResiduals()])
    assert got.changed == [0] and got.same_code


def test_matmuls_that_read_one_value_share_its_codes_and_weights_are_folded() -> None:
    passes = [AddResiduals(), ShareQuantize(), FoldWeights()]
    got = apply(SharedInput(), torch.randn(2, 3, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=passes, decide=with_outliers())
    assert got.changed == [3, 2, 3]
    assert got.count(QUANTIZE_RESIDUAL) == 1 and got.count(QUANTIZE_REPEATED) == 3
    assert got.after.count("kept in the weight store") == 3


@pytest.mark.parametrize("capability", [90, 100])
def test_the_rest_of_the_pipeline_takes_wider_products(capability: int) -> None:
    """In the layouts of native kernels too, of which the CPU computes the same values."""
    model, x = nn.Linear(128, 64, bias=False, dtype=BF16), torch.randn(130, 128, dtype=BF16)
    first = [type(each) for each in PIPELINE].index(AssignPrecision) + 1
    target = Target(name=f"sm_{capability}", device_type="cuda", capability=capability)
    got = apply(model, x, setup=PIPELINE[:first], passes=PIPELINE[first:], decide=with_outliers(count=128), target=target)
    expected = eager(x, model, some_outliers(128, count=128))
    torch.testing.assert_close(got.output.double(), expected, rtol=2**-7, atol=2**-7)
    assert got.after.count("b_layout='swizzled'" if capability == 100 else "b_layout='tiled'") == 1
    assert "k=256" in got.after

"""A backward that its plan keeps in high precision reads what the forward's codes decode to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp4compile.codegen import ops
from fp4compile.passes.dequantize_backward import DequantizeBackward
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.share_quantize import ShareQuantize
from fp4compile.passes.site import Decision, Role, Site
from tests.passes.harness import W4A4, W4A16, Applied, TwoLayers, apply, check_golden
from tests.passes.linear_ref import BF16, SETUP, fake
from tests.passes.own_backward import Expanded, Flattened, Grouped, TwoWeights


def decide(configs: dict, sites: list[Site]) -> list[Decision]:
    plain = Decision(configs={}, rule="test rule", reason="test")
    by_role = {Role.FPROP: replace(plain, configs=configs), Role.MATMUL: plain}
    return [by_role.get(s.role, replace(plain, dequantized=True)) for s in sites]


def applied(configs: dict):
    return run(TwoLayers(), torch.randn(6, 32, dtype=BF16, requires_grad=True), configs=configs)


def run(model: nn.Module, *args: Tensor, configs: dict = W4A4, strict: bool = False) -> Applied:
    setup = [*SETUP, InsertQuantize(), ShareQuantize()]
    return apply(
        model, *args, setup=setup, passes=[DequantizeBackward()], decide=lambda s: decide(configs, s), training=True, strict=strict
    )


def test_each_factor_is_what_the_forward_multiplied_with(accept: bool) -> None:
    got = applied(W4A4)
    check_golden("dequantize_backward/w4a4", got.before, got.after, accept)
    # Two layers: X for wgrad and W for dgrad of each.
    assert got.changed == [4] and got.changed_again == [0] and got.count(ops.DEQUANTIZE) == 4


def test_what_the_forward_did_not_quantize_stays() -> None:
    assert applied(W4A16).changed == [2]
    assert applied({}).changed == [0] and applied({}).same_code


def batch() -> Tensor:
    return torch.randn(2, 16, 32, requires_grad=True)


def test_a_backward_that_flattens_what_the_forward_batched_reads_a_view_of_the_values(accept: bool) -> None:
    model, x = Flattened(), batch()
    got = run(model, x)
    check_golden("dequantize_backward/flattened", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0]
    dy = torch.randn_like(got.output)
    got.output.backward(dy)
    weight = fake(model.weights[0].detach())
    assert torch.allclose(x.grad, dy @ weight.flatten(0, 1), rtol=1e-5, atol=1e-5)
    want = dy.flatten(0, 1).T @ fake(x.detach()).flatten(0, 1)
    assert torch.allclose(model.weights[0].grad, want.view(2, 24, 32), rtol=1e-5, atol=1e-5)


def test_each_of_two_weights_under_one_number_is_its_own() -> None:
    """Both are as large: one taken for the other would only show in the values."""
    model, x = TwoWeights(), batch()
    got = run(model, x)
    assert got.changed == [4]
    dy = torch.randn_like(got.output)
    got.output.backward(dy)
    w, v = (fake(p.detach()) for p in model.weights)
    assert torch.allclose(x.grad, dy @ v @ w, rtol=1e-4, atol=1e-4)
    hidden = fake(x.detach()) @ w.T
    assert torch.allclose(model.weights[1].grad, dy.flatten(0, 1).T @ fake(hidden).flatten(0, 1), rtol=1e-4, atol=1e-3)


def test_grouped_products_read_the_values_too() -> None:
    """Also where no policy could quantize the backward, because groups split its contraction."""
    model, x = Grouped(), torch.randn(48, 32, dtype=BF16, requires_grad=True)
    got = run(model, x)
    assert got.changed == [2] and got.changed_again == [0]
    dy = torch.randn_like(got.output)
    got.output.backward(dy)
    values = torch.stack([fake(w) for w in model.weight.detach()]).bfloat16()
    want = torch.cat([dy[:16] @ values[0], dy[16:] @ values[1]])
    assert torch.allclose(x.grad.float(), want.float(), rtol=2e-2, atol=1e-1)
    rows = fake(x.detach()).bfloat16()
    want = torch.stack([dy[:16].T @ rows[:16], dy[16:].T @ rows[16:]])
    assert torch.allclose(model.weight.grad.float(), want.float(), rtol=2e-2, atol=1e-1)


def test_what_no_forward_product_reads_is_reported_with_the_reason() -> None:
    got = run(Expanded(), batch())
    assert got.record is not None and got.changed == [1] and got.changed_again == [0]
    (fallen,) = [row for row in got.record.sites if row.fallback]
    assert (fallen.role, fallen.precision) == ("dgrad", "float32")
    assert fallen.reason == (
        "reads an operand as it is, not as the forward multiplied with it: "
        "no matmul of its forward reads this weight (48x32) in the same order"
    )


class SumOfProducts(nn.Module):
    """An operator that no pass rewrites; its backward is made of products."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 32, 48))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addbmm(torch.ones(16, 48), x, self.w)


def test_a_forward_that_could_not_be_quantized_leaves_nothing_to_say_of_its_backward() -> None:
    got = run(SumOfProducts(), batch())
    assert got.record is not None and got.changed == [0]
    assert {row.role: row.fallback for row in got.record.sites} == {"fprop": True, "dgrad": False, "wgrad": False}


def test_strict_refuses_it() -> None:
    with pytest.raises(Exception, match=r"ForwardNotRead: strict: .* \(dgrad\) was to read what its forward multiplied with, by test rule"):
        run(Expanded(), batch(), strict=True)

"""A backward that its plan keeps in high precision reads what the forward's codes decode to."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp4compile.codegen import ops
from fp4compile.passes.dequantize_backward import DequantizeBackward
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.share_quantize import ShareQuantize
from fp4compile.passes.site import Decision, Role, Site
from tests.passes.harness import W4A4, W4A16, TwoLayers, apply, check_golden
from tests.passes.linear_ref import BF16, SETUP


def decide(configs: dict, sites: list[Site]) -> list[Decision]:
    plain = Decision(configs={}, rule="test rule", reason="test")
    by_role = {Role.FPROP: replace(plain, configs=configs), Role.MATMUL: plain}
    return [by_role.get(s.role, replace(plain, dequantized=True)) for s in sites]


def applied(configs: dict):
    x = torch.randn(6, 32, dtype=BF16, requires_grad=True)
    setup = [*SETUP, InsertQuantize(), ShareQuantize()]
    return apply(TwoLayers(), x, setup=setup, passes=[DequantizeBackward()], decide=lambda s: decide(configs, s), training=True)


def test_each_factor_is_what_the_forward_multiplied_with(accept: bool) -> None:
    got = applied(W4A4)
    check_golden("dequantize_backward/w4a4", got.before, got.after, accept)
    # Two layers: X for wgrad and W for dgrad of each.
    assert got.changed == [4] and got.changed_again == [0] and got.count(ops.DEQUANTIZE) == 4


def test_what_the_forward_did_not_quantize_stays() -> None:
    assert applied(W4A16).changed == [2]
    assert applied({}).changed == [0] and applied({}).same_code

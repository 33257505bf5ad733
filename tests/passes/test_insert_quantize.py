"""Planned matmuls become scaled products; everything else stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4compile.codegen import ops
from fp4compile.passes.insert_quantize import InsertQuantize
from tests.passes.harness import W4A4, W4A16, TwoLayers, apply, check_golden, decide_forward
from tests.passes.linear_ref import BF16, PLAIN, SETUP, linear_ref


@pytest.mark.parametrize(("configs", "activation"), [(W4A4, PLAIN), (W4A16, None)], ids=["w4a4", "w4a16"])
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
    expected = linear_ref(linear_ref(x, model[0], PLAIN), model[1], PLAIN)
    torch.testing.assert_close(got.output, expected, rtol=2**-7, atol=1e-5)


def test_insert_quantize_leaves_unplanned_sites_alone() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=SETUP, passes=[InsertQuantize()], decide=decide_forward({}))
    assert got.changed == [0] and got.same_code

"""Backward products that quantize anew what the forward multiplied with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.codegen import ops
from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.insert_quantize import InsertQuantize
from fp4compile.passes.requantize_forward import RequantizeForward
from fp4compile.passes.share_quantize import ShareQuantize
from fp4compile.passes.site import Decision, OperandKind, Role, Site
from tests.passes.harness import Decide, apply, check_golden, decide_training
from tests.passes.linear_ref import SETUP
from tests.passes.own_backward import Expanded, Flattened

PLAIN, OF_FORWARD = QuantConfig(), QuantConfig(source="forward")  # type: ignore[arg-type]
ROTATED = QuantConfig(hadamard=16)
X = torch.randn(32, 48, requires_grad=True)


def asking(forward: QuantConfig | None) -> Decide:
    """The forward in `forward`, dgrad on its weight and wgrad on its activation."""
    first = {} if forward is None else {OperandKind.WEIGHT: forward, OperandKind.ACTIVATION: forward}
    by_role = {
        Role.FPROP: first,
        Role.DGRAD: {OperandKind.GRADIENT: PLAIN, OperandKind.WEIGHT: OF_FORWARD},
        Role.WGRAD: {OperandKind.GRADIENT: PLAIN, OperandKind.ACTIVATION: OF_FORWARD},
        Role.MATMUL: {},
    }
    return lambda sites: [decided(by_role, site) for site in sites]


def decided(by_role: dict[Role, dict[OperandKind, QuantConfig]], site: Site) -> Decision:
    return Decision(configs=by_role[site.role], rule="test rule", reason="test")


def test_backward_operands_come_from_the_codes_of_the_forward(accept: bool) -> None:
    passes = [RequantizeForward(), InsertQuantize(), ShareQuantize()]
    got = apply(nn.Linear(48, 64, bias=False), X, setup=SETUP, passes=passes, decide=asking(PLAIN), training=True)
    check_golden("requantize_forward/linear", got.before, got.after, accept)
    assert got.changed[0] == 2 and got.changed_again == [0, 0, 0]
    # X and W once for the forward, which the backward decodes, and both anew along the other axis; dY twice.
    assert got.count(ops.QUANTIZE) == 6 and got.count(ops.DEQUANTIZE) == 2
    assert all(config.source == "original" for plan in got.plans for config in (plan.lhs, plan.rhs) if config is not None)


def test_what_the_forward_kept_is_what_it_multiplied_with() -> None:
    got = apply(nn.Linear(48, 64, bias=False), X, setup=SETUP, passes=[RequantizeForward()], decide=asking(None), training=True)
    assert got.changed == [0] and got.count(ops.DEQUANTIZE) == 0
    assert all(config.source == "original" for plan in got.plans for config in (plan.lhs, plan.rhs) if config is not None)


def test_nothing_to_do_where_no_plan_asks() -> None:
    got = apply(nn.Linear(48, 64), X, setup=SETUP, passes=[RequantizeForward()], decide=decide_training, training=True)
    assert got.changed == [0] and got.same_code


def test_a_rotated_forward_is_refused() -> None:
    with pytest.raises(Exception, match="rotated operand, which the backward does not multiply with"):
        apply(nn.Linear(48, 64), X, setup=SETUP, passes=[RequantizeForward()], decide=asking(ROTATED), training=True)


B = torch.randn(2, 16, 32, requires_grad=True)
PASSES = [RequantizeForward(), InsertQuantize(), ShareQuantize()]


def test_a_backward_that_flattens_what_the_forward_batched_reads_a_view_of_its_codes(accept: bool) -> None:
    got = apply(Flattened(), B, setup=SETUP, passes=PASSES, decide=asking(PLAIN), training=True)
    check_golden("requantize_forward/flattened", got.before, got.after, accept)
    assert got.changed[0] == 2 and got.changed_again == [0, 0, 0] and got.count(ops.DEQUANTIZE) == 2
    assert got.record is not None and not any(row.fallback for row in got.record.sites)


def test_what_no_forward_product_reads_is_reported_with_the_reason() -> None:
    got = apply(Expanded(), B, setup=SETUP, passes=PASSES, decide=asking(PLAIN), training=True)
    assert got.record is not None and got.changed[0] == 1 and got.changed_again == [0, 0, 0]
    fallen = [row for row in got.record.sites if row.fallback]
    assert [(row.role, row.precision) for row in fallen] == [("dgrad", "nvfp4 W4A4")]
    assert fallen[0].reason == (
        "reads an operand as it is, not as the forward multiplied with it: "
        "no matmul of its forward reads this weight (48x32) in the same order"
    )


def test_strict_refuses_it() -> None:
    with pytest.raises(Exception, match=r"ForwardNotRead: strict: .* \(dgrad\) was to read what its forward multiplied with, by test rule"):
        apply(Expanded(), B, setup=SETUP, passes=PASSES, decide=asking(PLAIN), training=True, strict=True)

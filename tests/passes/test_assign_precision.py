"""The policy's answer, held against what a site can do; every site ends as a row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.assign_precision import AssignPrecision, operands_text
from fp4compile.passes.errors import SiteFellBack
from fp4compile.passes.find_matmuls import FindMatmuls
from fp4compile.passes.normalize import Normalize
from fp4compile.passes.site import Decision, Plan
from tests.passes.harness import W4A4, W4A16, TwoLayers, apply, check_golden, decide_forward

SETUP = [Normalize(), FindMatmuls()]
X = torch.randn(6, 32, dtype=torch.bfloat16)


def test_golden_plans(accept: bool) -> None:
    got = apply(TwoLayers(), X, setup=SETUP, passes=[AssignPrecision()], decide=decide_forward(W4A16))
    check_golden("assign_precision/w4a16", got.before, got.after, accept)
    assert got.same_code


def test_rows_name_precision_rule_reason_and_bytes() -> None:
    got = apply(TwoLayers(), X, setup=SETUP, passes=[AssignPrecision()], decide=decide_forward(W4A16))
    up, down = got.record.sites
    assert (up.name, up.precision, up.rule, up.reason, up.kernel) == ("up", "nvfp4 W4A16", "test rule", "test", "cpu")
    assert up.bytes_before == 40 * 32 * 2 and up.bytes_after == 40 * 32 * 4.5 / 8 + 4
    assert (down.m, down.n, down.k) == ("6", "32", "40")
    assert got.changed == [2] and got.same_code


def test_configs_follow_the_operand_kind() -> None:
    plan = apply(TwoLayers(), X, setup=SETUP, passes=[AssignPrecision()], decide=decide_forward(W4A16)).plans[0]
    assert plan.lhs is None and plan.rhs is not None and plan.precision == "nvfp4 W4A16"


def test_untouched_sites_say_their_dtype() -> None:
    got = apply(TwoLayers(), X, setup=SETUP, passes=[AssignPrecision()], decide=decide_forward({}))
    assert {row.precision for row in got.record.sites} == {"bfloat16"} and not any(row.fallback for row in got.record.sites)


def everything_4_bit(sites):
    return [Decision(configs=W4A4, rule="rule 1", reason="all") for _ in sites]


def test_a_site_that_cannot_follow_is_a_fallback_with_the_reason() -> None:
    model = nn.Linear(8, 8, dtype=torch.float64)
    got = apply(model, torch.randn(2, 8, dtype=torch.float64), setup=SETUP, passes=[AssignPrecision()], decide=everything_4_bit)
    (row,) = got.record.sites
    assert row.fallback and row.precision == "float64" and "float64 is not" in row.reason


def test_strict_makes_it_an_error_that_says_what_to_do() -> None:
    model = nn.Linear(8, 8, dtype=torch.float64)
    with pytest.raises(Exception) as caught:
        apply(model, torch.randn(2, 8, dtype=torch.float64), passes=[*SETUP, AssignPrecision()], decide=everything_4_bit, strict=True)
    assert SiteFellBack.__name__ in str(caught.value) and 'precision = "high"' in str(caught.value)


def test_a_batch_of_no_rows_is_no_broken_promise() -> None:
    got = apply(
        TwoLayers(), torch.randn(0, 32, dtype=torch.bfloat16), setup=[Normalize(), FindMatmuls()], passes=[AssignPrecision()], strict=True
    )
    assert [(r.reason, r.fallback) for r in got.record.sites] == [("a dimension is zero", False)] * 2


def test_operands_of_two_formats_are_both_named() -> None:
    nvfp4, mixfp4 = QuantConfig(), QuantConfig(format="mixfp4")
    texts = [operands_text(Plan(lhs=lhs, rhs=rhs, rule="", reason="")) for lhs, rhs in ((nvfp4, mixfp4), (nvfp4, nvfp4), (None, mixfp4))]
    assert texts == ["nvfp4 x mixfp4", "", ""]

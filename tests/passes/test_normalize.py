"""Sums split from their matmul, equal views merged, and what must stay apart."""

from __future__ import annotations

import torch

from fp4compile.passes.normalize import Normalize
from tests.passes.harness import SharedInput, TwoLayers, apply, check_golden

aten = torch.ops.aten


def scaled_sum(x: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.addmm(c, x, w, beta=2, alpha=3)


def test_golden_views_of_one_value_become_one(accept: bool) -> None:
    got = apply(SharedInput(), torch.randn(2, 3, 32, dtype=torch.bfloat16), passes=[Normalize()])
    check_golden("normalize/shared_input", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0]


def test_weighted_sum_is_split_and_keeps_its_value() -> None:
    x, w, c = torch.randn(4, 8), torch.randn(8, 6), torch.randn(4, 6)
    got = apply(scaled_sum, x, w, c, passes=[Normalize()])
    assert got.count(aten.addmm.default) == 0 and got.count(aten.mm.default) == 1
    torch.testing.assert_close(got.output, scaled_sum(x, w, c))


def test_batched_sum_is_split() -> None:
    c, a, b = torch.randn(2, 4, 6), torch.randn(2, 4, 8), torch.randn(2, 8, 6)
    got = apply(lambda c, a, b: torch.baddbmm(c, a, b, beta=0.5), c, a, b, passes=[Normalize()])
    assert got.count(aten.baddbmm.default) == 0 and got.count(aten.bmm.default) == 1
    torch.testing.assert_close(got.output, torch.baddbmm(c, a, b, beta=0.5))


def test_zero_beta_ignores_even_nan() -> None:
    c, a, b = torch.full((4, 6), torch.nan), torch.randn(4, 8), torch.randn(8, 6)
    got = apply(lambda c, a, b: torch.addmm(c, a, b, beta=0), c, a, b, passes=[Normalize()])
    torch.testing.assert_close(got.output, a @ b)


def test_addmm_with_a_vector_bias_is_left_whole() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=torch.bfloat16), passes=[Normalize()])
    assert got.count(aten.addmm.default) == 1 and got.changed == [0]


def test_a_bias_of_one_element_is_added_outside_because_kernels_read_one_a_column() -> None:
    c, a, b = torch.randn(1), torch.randn(4, 8), torch.randn(8, 6)
    got = apply(lambda c, a, b: torch.addmm(c, a, b), c, a, b, passes=[Normalize()])
    assert got.count(aten.addmm.default) == 0 and got.count(aten.mm.default) == 1
    torch.testing.assert_close(got.output, torch.addmm(c, a, b))


def test_forward_never_reads_a_merged_backward_view() -> None:
    # The verifier that `apply` runs after each pass raises if it did.
    got = apply(SharedInput(), torch.randn(2, 3, 32, dtype=torch.bfloat16), passes=[Normalize()], training=True)
    assert got.changed[0] > 0

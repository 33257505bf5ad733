"""Dead nodes go, live ones stay."""

from __future__ import annotations

import torch

from fp4compile.passes.cleanup import Cleanup
from fp4compile.passes.insert_quantize import InsertQuantize
from tests.passes.harness import TwoLayers, apply, check_golden
from tests.passes.linear_ref import BF16, SETUP


def test_cleanup(accept: bool) -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), setup=[*SETUP, InsertQuantize()], passes=[Cleanup()])
    check_golden("cleanup/w4a4", got.before, got.after, accept)
    assert got.changed == [2] and got.changed_again == [0]  # the permutes of both weights


def test_cleanup_keeps_what_is_read() -> None:
    got = apply(TwoLayers(), torch.randn(5, 32, dtype=BF16), passes=[Cleanup()])
    assert got.changed == [0] and got.same_code

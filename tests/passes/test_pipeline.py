"""All passes together."""

from __future__ import annotations

import pytest
import torch

from fp4compile.passes.pipeline import PIPELINE
from tests.passes.harness import W4A4, TwoLayers, apply, decide_forward, decide_training
from tests.passes.linear_ref import BF16


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_whole_pipeline_is_idempotent(training: bool, dynamic: bool) -> None:
    x = torch.randn(6, 32, dtype=BF16, requires_grad=training)
    decide = decide_training if training else decide_forward(W4A4)
    again = [p for p in PIPELINE if p.name not in ("find-matmuls", "assign-precision")]
    got = apply(TwoLayers(), x, setup=PIPELINE, passes=again, decide=decide, training=training, dynamic=dynamic)
    assert sum(got.changed) == 0

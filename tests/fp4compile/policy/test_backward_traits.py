"""What the graph shows of a layer's forward holds for its backward: an exception by trait covers all three matmuls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp4compile

POLICY = {"version": 1, "extends": "nvfp4", "training": {"dgrad": "w4a4", "wgrad": "w4a4"}}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner, self.unusual = nn.Embedding(256, 64), nn.Linear(64, 64), nn.Linear(64, 256, bias=False)
        self.unusual.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unusual(torch.relu(self.inner(self.table(tokens)))).float().square().mean()


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.unusual = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        weights, _ = self.unusual(x).softmax(-1).topk(2)
        return (x * weights.sum(-1, keepdim=True)).float().mean()


@pytest.mark.parametrize(
    ("model", "example", "reason"),
    [
        (Tied, torch.zeros(2, 32, dtype=torch.long), "shares its weight with an embedding"),
        (Routed, torch.ones(32, 64, dtype=torch.bfloat16), "decides which expert a token goes to"),
    ],
)
def test_an_exception_by_trait_covers_forward_and_backward(model, example, reason):
    report = fp4compile.explain(model().bfloat16(), example, policy=POLICY)
    sites = [site for graph in report.graphs for site in graph.sites]
    assert {(s.role, s.precision, s.reason) for s in sites if s.name == "unusual"} == {
        (r, "bfloat16", reason) for r in ("fprop", "dgrad", "wgrad")
    }
    assert {s.precision for s in sites if s.name == "inner"} == {"nvfp4 W4A4"}

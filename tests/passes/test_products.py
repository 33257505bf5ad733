"""Products of known size are listed once each; what is batched or of symbolic size is not."""

from __future__ import annotations

import torch
from torch import nn

from fp4compile import backend
from fp4compile.codegen.formats import QuantConfig
from fp4compile.passes.products import ProductShape, static_products


def products_of(model, *args, dynamic=False, training=False, policy="nvfp4", monkeypatch) -> list[ProductShape]:
    found: list[ProductShape] = []
    right = backend._Transform.__call__

    def transform(self, gm) -> None:
        right(self, gm)
        found.extend(static_products(gm))

    monkeypatch.setattr(backend._Transform, "__call__", transform)
    torch.compiler.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend="fp4", dynamic=dynamic, options={"policy": policy})(*args)
    assert {site.kernel for site in backend.last_report().sites} == {"cpu"}, "nothing was quantized"
    torch.compiler.reset()
    return found


def sizes(found: list[ProductShape]) -> list[tuple[int, int, int]]:
    return [(p.m, p.n, p.k) for p in found]


def test_equal_layers_count_once_and_rows_of_all_matrices_of_x_together(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(48, 16, bias=False)).bfloat16()
    found = products_of(model, torch.randn(2, 5, 32).bfloat16(), monkeypatch=monkeypatch)
    assert sizes(found) == [(10, 32, 32), (10, 48, 32), (10, 16, 48)]
    spec = found[0].spec
    assert spec.op == "scaled_mm" and spec.lhs == spec.rhs == QuantConfig() and spec.dtype is torch.bfloat16


def test_layers_that_were_calibrated_apart_count_once(monkeypatch) -> None:
    rules = [{"match": str(i), "activation": {"global_scale": "static", "static_amax": 2.0 + i}} for i in range(2)]
    policy = {"version": 1, "extends": "nvfp4", "rule": rules}
    found = products_of(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(5, 32), policy=policy, monkeypatch=monkeypatch)
    assert sizes(found) == [(5, 32, 32)] and found[0].spec.lhs == QuantConfig(global_scale="static", static_amax=1.0)


def test_a_ragged_k_counts_as_it_is_and_w4a16_has_a_plain_side(monkeypatch) -> None:
    found = products_of(nn.Linear(40, 24), torch.randn(3, 40), policy="nvfp4_a16", monkeypatch=monkeypatch)
    assert sizes(found) == [(3, 24, 40)] and found[0].spec.lhs is None


def test_a_backward_has_its_own_products(monkeypatch) -> None:
    found = products_of(
        nn.Linear(64, 32), torch.randn(16, 64, requires_grad=True), policy="nvfp4_train", training=True, monkeypatch=monkeypatch
    )
    assert set(sizes(found)) == {(16, 32, 64), (16, 64, 32), (32, 64, 16)}


def test_symbolic_sizes_are_left_out(monkeypatch) -> None:
    assert products_of(nn.Linear(64, 32), torch.randn(16, 64), dynamic=True, monkeypatch=monkeypatch) == []


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_batches_of_weights_are_left_out(monkeypatch) -> None:
    assert products_of(Experts(), torch.randn(2, 8, 32), monkeypatch=monkeypatch) == []

"""`mode="max-autotune"` searches the tiles of each static product once a compilation, with real tensors; other modes search nothing."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fp4compile.codegen import registry
from fp4compile.codegen.registry import KernelFamily

MODULE = "fp4compile.codegen.kernels.search_for_this_test"


@pytest.fixture
def searched(monkeypatch) -> list[tuple[int, int, int, str]]:
    calls = []
    module = ModuleType(MODULE)

    def search(spec, m: int, n: int, k: int, device: torch.device) -> None:
        made = torch.ones(m, k, device=device)
        assert not isinstance(made, FakeTensor) and not torch.is_grad_enabled() and float((made @ made.mT)[0, 0]) == k
        calls.append((m, n, k, spec.op))

    module.search = search  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    family = KernelFamily(name="cpu", device_type="cpu", ops=("scaled_mm",), folder="cpu", ending=".cpp", search=MODULE)
    monkeypatch.setattr(registry, "FAMILIES", (family,))
    torch.compiler.reset()
    yield calls
    torch.compiler.reset()


def run(mode: str | None, *, rows: int = 3, training: bool = False, options: dict | None = None) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48))
    given = {"options": options} if options else {"mode": mode}
    with torch.set_grad_enabled(training):
        out = torch.compile(model, backend="fp4", dynamic=False, **given)(torch.randn(rows, 64))
    if training:
        out.sum().backward()


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
def test_each_product_is_searched_before_the_graph_runs(searched, mode) -> None:
    run(mode)
    assert searched == [(3, 32, 64, "scaled_mm"), (3, 48, 32, "scaled_mm")]


def test_the_mode_may_be_an_option_too(searched) -> None:
    run(None, options={"mode": "max-autotune", "policy": "nvfp4_a16"})
    assert len(searched) == 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_other_modes_search_nothing(searched, mode) -> None:
    run(mode)
    assert searched == []


def test_products_of_the_backward_are_searched_with_the_forward(searched) -> None:
    run(None, rows=16, training=True, options={"mode": "max-autotune", "policy": "nvfp4_train"})
    assert {(m, n, k) for m, n, k, _ in searched} >= {(16, 32, 64), (32, 64, 16)}


def test_a_search_leaves_the_users_random_numbers_alone(searched) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    model, x = nn.Linear(64, 32), torch.randn(3, 64)
    torch.manual_seed(1)
    with torch.no_grad():
        torch.compile(model, backend="fp4", mode="max-autotune")(x)
    assert torch.equal(torch.rand(1), expected) and searched

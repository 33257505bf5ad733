"""Different calls are listed once each, with the sizes, strides and settings that their kernels depend on; zeros can stand in for them."""

from __future__ import annotations

import torch
from torch import nn

from fp4compile import backend
from fp4compile.codegen import ops
from fp4compile.passes.operator_calls import OperatorCall, TensorLike, operator_calls


def calls_of(
    model: nn.Module, x: torch.Tensor, monkeypatch, *, training: bool = False, dynamic: bool = False, policy: object = "nvfp4"
) -> list[OperatorCall]:
    found: list[OperatorCall] = []
    right = backend._Transform.__call__

    def transform(self, gm) -> None:
        right(self, gm)
        found.extend(operator_calls(gm))

    monkeypatch.setattr(backend._Transform, "__call__", transform)
    torch.compiler.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend="fp4", dynamic=dynamic, options={"policy": "nvfp4_train" if training else policy})(x)
    torch.compiler.reset()
    return found


def test_equal_layers_need_their_kernels_once(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 48))
    found = calls_of(model, torch.randn(5, 32), monkeypatch)
    products = [call for call in found if call.target is ops.SCALED_MM]
    assert [call.args[3].size for call in products] == [(32, 16), (48, 16)] and len(set(found)) == len(found)
    weights = [call.args[0] for call in found if call.target is ops.QUANTIZE]
    assert TensorLike((32, 32), (32, 1), torch.float32) in weights and TensorLike((5, 32), (32, 1), torch.float32) in weights


def test_a_training_graph_lists_its_backward_too_and_every_call_runs_on_zeros(monkeypatch) -> None:
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.ReLU())))
    found = calls_of(model, torch.randn(16, 32), monkeypatch, training=True)
    assert {call.target for call in found} >= {ops.QUANTIZE, ops.QUANTIZE_BOTH, ops.SCALED_MM}
    assert any("stochastic" in call.args for call in found)
    for call in found:
        call.run(torch.device("cpu"))


def test_symbolic_sizes_count_as_those_that_were_seen(monkeypatch) -> None:
    found = calls_of(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(7, 32), monkeypatch, dynamic=True)
    assert (7, 16) in [call.args[0].size for call in found if call.target is ops.SCALED_MM]


def test_searches_have_no_kernel(monkeypatch) -> None:
    swept = {"version": 1, "extends": "nvfp4", "default": {"weight": {"scale_rule": "sweep"}}}
    found = calls_of(nn.Linear(32, 48), torch.randn(5, 32), monkeypatch, policy=swept)
    assert [call.args[0].size for call in found if call.target is ops.QUANTIZE] == [(5, 32)]


def test_zeros_have_the_strides_of_a_view() -> None:
    across = TensorLike((3, 4), (1, 3), torch.int32).zeros(torch.device("cpu"))
    assert across.shape == (3, 4) and across.stride() == (1, 3) and not across.any()
    assert TensorLike((0, 4), (4, 1), torch.float32).zeros(torch.device("cpu")).shape == (0, 4)
    assert TensorLike((3, 4), (0, 1), torch.float32).zeros(torch.device("cpu")).untyped_storage().nbytes() == 16

"""Each weight is quantized once, again exactly when it changes, and never served stale."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fp4compile
from fp4compile.codegen.formats import QuantConfig
from fp4compile.codegen.reference.block import dequantize_ref, quantize_ref
from fp4compile.passes.fold_weights import CutConstant
from fp4compile.weights import STORE, Reader, WeightStore

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, dtype=BF16), nn.Linear(96, 64, dtype=BF16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def expected(model: Mlp, x: torch.Tensor) -> torch.Tensor:
    def linear(x, layer):
        weight = dequantize_ref(*quantize_ref(layer.weight, QuantConfig()))
        return (x.float() @ weight.T + layer.bias.float()).to(BF16)

    return linear(torch.relu(linear(x, model.up)), model.down)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2**-7, atol=2e-3)  # fp32 sums in another order, then one bf16 rounding twice


def compiled(model: nn.Module, **options):
    return torch.compile(model, backend="fp4", options={"policy": "nvfp4_a16", **options})


@torch.no_grad()
def test_quantized_once_and_shared_between_graphs() -> None:
    model, before = Mlp(), STORE.quantizations
    run = compiled(model)
    for rows in (1, 5, 9):  # three shapes, at least two graphs
        close(run(torch.ones(rows, 64, dtype=BF16)), expected(model, torch.ones(rows, 64, dtype=BF16)))
    assert STORE.quantizations - before == 2
    assert len(fp4compile.last_report().graphs) >= 2


@torch.no_grad()
def test_what_the_store_computes_has_no_prims_whose_calls_outside_inductor_are_slow() -> None:
    """Under autocast a float32 weight is converted first; what is stored is made of the converted weight."""
    model = Mlp().float()
    with torch.autocast("cpu", BF16):
        compiled(model)(torch.ones(3, 64))
    [(compute, values)] = STORE.codes_of(model.up.weight)
    targets = [node.target for node in compute.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten._to_copy.default, torch.ops.fp4.quantize.default]
    assert all(torch.equal(a, b) for a, b in zip(values, quantize_ref(model.up.weight.bfloat16(), QuantConfig()), strict=True))


def in_place(model: Mlp) -> None:
    model.up.weight.add_(0.5)


def load(model: Mlp) -> None:
    model.load_state_dict({**model.state_dict(), "up.weight": torch.randn(96, 64, dtype=BF16)})


def assign(model: Mlp) -> None:
    model.up.weight.data = torch.randn(96, 64, dtype=BF16)


def merge_lora(model: Mlp) -> None:
    model.up.weight += torch.randn(96, 4, dtype=BF16) @ torch.randn(4, 64, dtype=BF16)


def new_parameter(model: Mlp) -> None:
    model.up.weight = nn.Parameter(torch.randn(96, 64, dtype=BF16))


@pytest.mark.parametrize("change", [in_place, load, assign, merge_lora, new_parameter])
@torch.no_grad()
def test_a_changed_parameter_is_quantized_again_exactly_once(change) -> None:
    model, x = Mlp(), torch.randn(4, 64, dtype=BF16)
    run = compiled(model)
    run(x)
    before = STORE.quantizations
    change(model)
    for _ in range(3):
        close(run(x), expected(model, x))
    assert STORE.quantizations - before == (2 if change is load else 1)  # load_state_dict writes every weight


@torch.no_grad()
def test_a_write_through_data_is_seen_after_refresh() -> None:
    model, x = Mlp(), torch.randn(4, 64, dtype=BF16)
    run = compiled(model)
    run(x)
    model.up.weight.data.add_(0.5)
    assert fp4compile.refresh(model) >= 2
    close(run(x), expected(model, x))


@torch.no_grad()
def test_one_compiled_layer_serves_many_modules() -> None:
    """Regional compilation: the same code meets the parameters of another module."""
    layers = nn.ModuleList(Mlp() for _ in range(3))
    for layer in layers:
        layer.compile(backend="fp4", options={"policy": "nvfp4_a16"})
    x = torch.randn(4, 64, dtype=BF16)
    for _ in range(2):
        for layer in layers:
            close(layer(x), expected(layer, x))


@torch.no_grad()
def test_entries_die_with_their_parameters() -> None:
    gc.collect()
    model, before = Mlp(), len(STORE.entries)
    run = compiled(model)
    run(torch.randn(4, 64, dtype=BF16))
    assert len(STORE.entries) == before + 2
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert len(STORE.entries) == before


@torch.no_grad()
def test_free_weights_releases_reports_and_restores() -> None:
    model, x = Mlp(), torch.randn(4, 64, dtype=BF16)
    original = copy.deepcopy(model.state_dict())
    run = compiled(model, free_weights=True)
    first = run(x)
    assert sum(g.freed_bytes for g in fp4compile.last_report().graphs) == 2 * 64 * 96 * 2
    assert model.up.weight.untyped_storage().nbytes() == 2 and model.up.weight.isnan().all()
    assert torch.equal(run(x), first) and run(torch.randn(7, 64, dtype=BF16)).isfinite().all()

    assert fp4compile.restore(model) == 2
    decoded = dequantize_ref(*quantize_ref(original["up.weight"], QuantConfig())).to(BF16)
    assert torch.equal(model.up.weight, decoded)
    assert torch.equal(run(x), first)


@torch.no_grad()
def test_restore_from_a_state_dict_is_exact(tmp_path) -> None:
    model, x = Mlp(), torch.randn(4, 64, dtype=BF16)
    original = copy.deepcopy(model.state_dict())
    torch.save(original, tmp_path / "weights.pt")
    run = compiled(model, free_weights=True)
    run(x)
    with pytest.raises(fp4compile.Fp4CompileError, match=r"up\.weight is not in the given state dict"):
        fp4compile.restore(model, {})
    assert fp4compile.restore(model, tmp_path / "weights.pt") == 2
    assert torch.equal(model.up.weight, original["up.weight"])
    close(run(x), expected(model, x))


@torch.no_grad()
def test_a_freed_weight_needed_in_high_precision_is_an_error_not_a_wrong_result() -> None:
    model, x = Mlp(), torch.randn(4, 64, dtype=BF16)
    compiled(model, free_weights=True)(x)
    with pytest.raises(Exception, match="free_weights released it"):
        torch.compile(model, backend="fp4", options={"policy": "bf16"})(x)
    with pytest.raises(Exception, match="free_weights released it"):
        compiled(model, policy="mxfp4_a16")(x)


class Decays(nn.Module):
    """Writes to its own weight, between two uses of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96, dtype=BF16)

    def forward(self, x):
        before = self.up(x)
        self.up.weight.mul_(0.5)
        return before, self.up(x)


@torch.no_grad()
def test_a_weight_that_the_graph_changes_is_quantized_where_it_is_read() -> None:
    model, x = Decays(), torch.randn(4, 64, dtype=BF16)
    run = compiled(model)
    for _ in range(2):
        weights = [dequantize_ref(*quantize_ref(w, QuantConfig())) for w in (model.up.weight.clone(), model.up.weight * 0.5)]
        for got, weight in zip(run(x), weights, strict=True):
            close(got, (x.float() @ weight.T + model.up.bias.float()).to(BF16))
    assert all(row.precision == "nvfp4 W4A16" for row in fp4compile.last_report().sites)


def test_parameters_made_in_inference_mode_have_no_version_and_still_work() -> None:
    with torch.inference_mode():
        model, x = Mlp(), torch.randn(4, 64, dtype=BF16)
        run = compiled(model)
        before = STORE.quantizations
        for _ in range(3):
            close(run(x), expected(model, x))
        assert STORE.quantizations - before == 2
        model.up.weight.data = torch.randn(96, 64, dtype=BF16)
        close(run(x), expected(model, x))
        model.up.weight.add_(0.5)
        fp4compile.refresh(model)
        close(run(x), expected(model, x))


class Subclass(torch.Tensor):
    pass


def test_of_a_subclass_of_tensor_plain_values_are_stored() -> None:
    store, weight = WeightStore(), nn.Parameter(torch.randn(4, 16).as_subclass(Subclass))
    doubled = fx.symbolic_trace(lambda w: (w * 2,))
    [values] = store.fetch("twice", [weight], doubled)
    assert type(values) is Tensor and torch.equal(values, weight.as_subclass(Tensor) * 2)


def test_a_call_with_unchanged_parameters_asks_for_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """210 weights a token: what a decoder pays for is a glance at each parameter. A dead model's codes are let go."""
    fetched = 0
    fetch = WeightStore.fetch

    def counted(*args: Any) -> tuple[Tensor, ...]:
        nonlocal fetched
        fetched += 1
        return fetch(*args)

    monkeypatch.setattr(WeightStore, "fetch", counted)
    double = CutConstant(compute=fx.symbolic_trace(lambda p: (2 * p,)), recipe="double", inputs=(0,), outputs=(0,))
    store, parameter = WeightStore(), torch.nn.Parameter(torch.ones(2))
    reader = Reader(store=store, cuts=[double])
    for _ in range(3):
        assert reader.read([parameter])[0].tolist() == [2, 2]
    assert fetched == 1
    with torch.no_grad():
        parameter.add_(1)
    assert reader.read([parameter])[0].tolist() == [4, 4] and fetched == 2
    parameter.data = torch.zeros(2)
    assert reader.read([parameter])[0].tolist() == [0, 0] and fetched == 3
    store.refresh([parameter])
    reader.read([parameter])
    assert fetched == 4 and store.quantizations == 4
    assert reader.values is not None
    codes = weakref.ref(reader.values[0])
    del parameter
    gc.collect()
    assert codes() is None and not store.entries
